"""The two halves of a decoding step as CUDA graphs: a replay costs the host one call, where the
same kernels one by one cost it more time than the device needs to run them.

A graph repeats the same kernels on the same memory. So the KV cache's length is a number on the
device, and attention reads the cache up to the next multiple of CHUNK positions: there is one graph
of the transformer's step for each. Graphs live as long as one decoding, since a host may move the
weights between two.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..transformer import KVCache, positions_of

if TYPE_CHECKING:
    from ..model import TokenShuffleModel

CHUNK = 512  # positions
QUEUE = 8  # steps that the host may ask for before the device has done them
WARM_UP = 2  # runs before a capture, in which libraries take their workspaces

log = logging.getLogger(__name__)


class StaticCache(KVCache):
    """The memory of a KV cache whose length is a number on the device as well.

    `reach` positions of it are read, of which those behind the length are masked.
    """

    def __init__(self, cache: KVCache):
        vars(self).update(vars(cache))
        self.position = torch.tensor(self.length, device=self.padding.device)
        self.reach = self.capacity
        for held in (*self.keys, *self.values):  # what is masked counts all the same if it is nan
            held[:, :, self.length :].zero_()

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        index = self.position + torch.arange(keys.shape[2], device=keys.device)
        self.keys[layer].index_copy_(2, index, keys)
        self.values[layer].index_copy_(2, index, values)
        return self.keys[layer][:, :, : self.reach], self.values[layer][:, :, : self.reach]

    def places(self, length: int) -> tuple[Tensor, Tensor | None]:
        slots = torch.arange(self.reach, device=self.padding.device)
        index = self.position + slots[:length, None]
        visible = (slots <= index) & (slots >= self.padding[:, None, None])
        index = index.T.expand(len(self.padding), length)
        return positions_of(index, self.padding, self.layout), visible[:, None]

    def advance(self, length: int) -> None:
        """Left to `move`: a graph is run before it counts."""

    def move(self, length: int) -> None:
        self.length += length
        self.position += length

    def drop(self, length: int) -> None:
        if length:
            self.move(-length)


class Captured:
    """A function of tensors on one device, captured at its first call.

    It may have no effect that a second run with the same inputs would not repeat. What it returns
    is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor], pool):
        self.function = function
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | bool | None = None  # False: it cannot be captured

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            stream = torch.cuda.current_stream()
            try:
                self._capture([x.clone() for x in inputs])
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
                log.warning("decoding goes on without a CUDA graph: %s", str(error).split("\n")[0])
                self.graph = False
        if self.graph is False:
            return self.function(*inputs)
        for held, x in zip(self.inputs, inputs, strict=True):
            held.copy_(x)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a host may go on with CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.output = self.function(*inputs)
        self.graph = graph


class CapturedStep:
    """`model.step` of `ahead` windows; of fewer, as at the end of a picture, without a graph."""

    def __init__(
        self, model: "TokenShuffleModel", cache: StaticCache, window: int, ahead: int, pool
    ):
        self.cache = cache
        self.ahead = ahead
        self.pool = pool
        self.function = partial(model.step, cache, window=window)
        self.captured: Captured | None = None
        self.done: deque[torch.cuda.Event] = deque()

    def __call__(self, codes: Tensor) -> Tensor:
        cache, count = self.cache, codes.shape[1]
        reach = min(-(-(cache.length + count) // CHUNK) * CHUNK, cache.capacity)
        if reach != cache.reach or self.captured is None:
            cache.reach = reach
            if self.captured is None or self.captured.graph is not False:
                self.captured = Captured(self.function, self.pool)
        states = (self.captured if count == self.ahead else self.function)(codes)
        cache.move(count)
        self._keep_pace()
        return states

    def _keep_pace(self) -> None:
        """Without it, progress and interrupts would be as far ahead as the launch queue is long."""
        self.done.append(torch.cuda.Event())
        self.done[-1].record()
        if len(self.done) > QUEUE:
            self.done.popleft().synchronize()


def capture(
    model: "TokenShuffleModel",
    cache: KVCache,
    window: int,
    ahead: int,
    sample: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], KVCache] | None:
    """`sample(states, noise, scale)` and the step that follows it as graphs, and the cache they
    share; None where there is no CUDA, on another device than the current one, or where weights are
    elsewhere, as a host with a small card has them.
    """
    device = cache.padding.device
    if device.type != "cuda" or device.index != torch.cuda.current_device():
        return None
    if any(weight.device != device for weight in model.parameters()):
        return None
    pool = torch.cuda.graph_pool_handle()
    captured = Captured(sample, pool)

    def captured_sample(states: Tensor, noise: Tensor, scale: Tensor | None) -> Tensor:
        inputs = (states, noise) if scale is None else (states, noise, scale)
        return (captured if states.shape[1] == ahead else sample)(*inputs)

    static = StaticCache(cache)
    return captured_sample, CapturedStep(model, static, window, ahead, pool), static
