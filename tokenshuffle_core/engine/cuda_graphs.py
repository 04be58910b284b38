"""The two halves of a decoding step as CUDA graphs: a replay is one call for the host, while
launching the kernels one by one takes longer than the device needs to run them.

A graph repeats the same kernels on the same memory. So the KV cache's length is stored on the
device, and attention reads the cache up to the next multiple of CHUNK positions, with one graph of
the transformer's step for each. Graphs are captured anew for each call of the sampler, since a host
may move the weights in between.
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
QUEUE = 8  # steps that the host may launch ahead of the device
WARM_UP = 2  # runs before a capture, in which libraries allocate their workspaces

log = logging.getLogger(__name__)


class StaticCache(KVCache):
    """The memory of a KV cache, with its length also stored on the device.

    Attention reads the first `reach` positions; those beyond the length are masked.
    """

    def __init__(self, cache: KVCache):
        vars(self).update(vars(cache))
        self.position = torch.tensor(self.length, device=self.padding.device)
        self.reach = self.capacity
        for stored in (*self.keys, *self.values):  # nan would get through the mask
            stored[:, :, self.length :].zero_()

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
        """Left to `move`: a graph must not change the length while it is captured."""

    def move(self, length: int) -> None:
        self.length += length
        self.position += length

    def drop(self, length: int) -> None:
        if length:
            self.move(-length)


class Captured:
    """A function of tensors on one device, captured at its first call.

    Running it twice with the same inputs must have the same effect as running it once. Its result
    is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Tensor], pool):
        self.function = function
        self.pool = pool
        self.graph: torch.cuda.CUDAGraph | bool | None = None  # False if capturing fails

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            stream = torch.cuda.current_stream()
            try:
                self._capture([x.clone() for x in inputs])
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a failed capture leaves its own stream set
                log.warning("continuing without a CUDA graph: %s", str(error).split("\n")[0])
                self.graph = False
        if self.graph is False:
            return self.function(*inputs)
        for stored, x in zip(self.inputs, inputs, strict=True):
            stored.copy_(x)
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
        # Other threads of a host may keep using CUDA.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.output = self.function(*inputs)
        self.graph = graph


class CapturedStep:
    """`model.step` as a graph for `ahead` windows; fewer, at a picture's end, run without one."""

    def __init__(
        self, model: "TokenShuffleModel", cache: StaticCache, window: int, ahead: int, pool
    ):
        self.cache = cache
        self.ahead = ahead
        self.pool = pool
        self.function = partial(model.step, cache, window=window)
        self.captured: Captured | None = None
        self.pending: deque[torch.cuda.Event] = deque()

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
        """Otherwise the host would report progress far ahead of the device and react to interrupts
        late."""
        self.pending.append(torch.cuda.Event())
        self.pending[-1].record()
        if len(self.pending) > QUEUE:
            self.pending.popleft().synchronize()


def capture(
    model: "TokenShuffleModel",
    cache: KVCache,
    window: int,
    ahead: int,
    sample: Callable[..., Tensor],
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], KVCache] | None:
    """`sample(states, noise, scale)` and `model.step` as graphs, and the cache to use with them.

    None without CUDA, on a device other than the current one, and if weights are on another
    device, as a host with a small GPU may have them.
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
