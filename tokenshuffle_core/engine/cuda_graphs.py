"""Steps as CUDA graphs: a replay is one call for the host, while launching a step's kernels one by
one takes longer than the device needs to run them.

A graph repeats the same kernels on the same memory, so the KV cache's length is stored on the
device. Between replays the host only draws noise, for many steps at a time, and reads how many
windows are finished, a step or two behind the device. Graphs and their memory are kept for the next
picture of the same shape, as long as the weights stay where they are.
"""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..transformer import KVCache, Layout, positions_of, rotary_angles
from .pace import Pace
from .swapped import Swapped

if TYPE_CHECKING:
    from ..model import TokenShuffleModel
    from ..sampler import Decoding, Shape

CHUNK = 512  # positions
STREAMS: defaultdict[torch.device, list] = defaultdict(list)  # whose graphs are gone

log = logging.getLogger(__name__)


class StaticCache(KVCache):
    """A KV cache whose length is on the device from `hold` on, until the next `start`.

    Attention then reads the first `reach` positions; those beyond the length are masked.
    """

    reach: int | None = None

    def __init__(
        self,
        config: ModelConfig,
        padding: Tensor,
        capacity: int,
        dtype: torch.dtype,
        layout: Layout | None = None,
    ):
        super().__init__(config, padding, capacity, dtype, layout)
        for stored in (*self.keys, *self.values):  # nan would get through the mask
            stored.zero_()
        self.position = torch.zeros((), dtype=torch.int64, device=padding.device)
        self.paddings = torch.zeros_like(padding)
        # The rotary angles of the token at each place, less the padding where that counts.
        places = positions_of(torch.arange(capacity, device=padding.device)[None], None, layout)
        self.angles = tuple(angle[0, 0] for angle in rotary_angles(places, config))
        self.shift = self.paddings if layout is None else torch.zeros_like(padding)

    def start(self, padding: Tensor) -> None:
        super().start(padding)
        self.reach = None

    def hold(self) -> None:
        """Keep the length on the device, and the padding at the same address for each sequence."""
        self.position.fill_(self.length)
        self.paddings.copy_(self.padding)
        self.padding, self.reach = self.paddings, self.capacity

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.reach is None:
            return super().update(layer, keys, values)
        index = self.position + torch.arange(keys.shape[2], device=keys.device)
        self.keys[layer].index_copy_(2, index, keys)
        self.values[layer].index_copy_(2, index, values)
        return self.keys[layer][:, :, : self.reach], self.values[layer][:, :, : self.reach]

    def places(self, length: int) -> tuple[Tensor, Tensor | None]:
        if self.reach is None:
            return super().places(length)
        slots = torch.arange(self.reach, device=self.padding.device)
        index = self.position + slots[:length, None]
        visible = (slots <= index) & (slots >= self.padding[:, None, None])
        index = index.T.expand(len(self.padding), length)
        return positions_of(index, self.padding, self.layout), visible[:, None]

    def advance(self, length: int) -> None:
        if self.reach is None:
            super().advance(length)
        else:
            self.position += length

    def drop(self, length: int | Tensor) -> None:
        if self.reach is None:
            super().drop(length)
        else:
            self.position -= length


class CapturedSteps:
    """The steps of a picture as graphs, one for each number of windows and reach of the cache."""

    def __init__(self, decoding: "Decoding", pace: Pace):
        self.decoding, self.pace = decoding, pace
        self.replays: dict[tuple[int, int], Callable[[], None] | None] = {}
        on_gpu = decoding.done.is_cuda
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        # Of its own while it is there: libraries keep a workspace for each stream, which graphs
        # that were captured on it use, and PyTorch frees it with the first of these graphs. They
        # all go together, also those whose capture failed.
        self.stream = None
        if on_gpu:
            free = STREAMS[decoding.done.device]
            self.stream = free.pop() if free else torch.cuda.Stream()
            finalize(self, free.append, self.stream)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.finished = torch.zeros((), pin_memory=on_gpu)
        self.known = self.finished.numpy()  # reading it is no operation for the device
        self.pending: deque[Callable[[], None]] = deque()  # each waits for a step in flight

    def advance(self, model: "TokenShuffleModel", done: int) -> int:
        """Launch a step unless enough are in flight. Returns how many windows are known to be
        finished; `done` is what the call before returned."""
        decoding, cache, pending = self.decoding, self.decoding.cache, self.pending
        shape = decoding.shape
        positions = shape.positions
        if cache.reach is None:
            cache.hold()
            self.before = cache.length - shape.place(done - 1) - 1
            self.known[()] = done
            pending.clear()
        count, began = self.pace.count, time.perf_counter()
        if done + len(pending) < positions:  # otherwise those in flight finish the picture
            # The end of the last window that the step may sample, if all guesses are right.
            end = done + (len(pending) + 1) * decoding.ahead
            decoding.draw(min(end, positions))
            end = self.before + shape.place(end) + shape.row_ends
            reach = -(-end // CHUNK) * CHUNK
            layer, tokens = model.transformer, shape.tokens(count) * shape.rows
            if isinstance(layer, Swapped) and layer.stops_at_length(tokens):
                reach = cache.capacity  # one graph is enough
            cache.reach = min(reach, cache.capacity)
            self._launch(model, count)
            pending.append(self._mark())
            if len(pending) < decoding.lead and not self.pace.trying:
                return done
        pending.popleft()()
        finished = self.decoding.checked(float(self.known))
        seconds = time.perf_counter() - began if self.pace.trying else None
        self.pace.note(count, finished - done, seconds)
        return finished

    def stop(self, model: "TokenShuffleModel", done: int) -> None:
        """Wait for the steps in flight, which write into memory that may be freed next; after a
        finished picture, keep the graphs for the next one."""
        while self.pending:
            self.pending.popleft()()
        if done == self.decoding.shape.positions:
            KEPT[model] = _key(model, self.decoding.shape), self

    def _launch(self, model: "TokenShuffleModel", count: int) -> None:
        key = count, self.decoding.cache.reach
        if key in self.replays:
            replay = self.replays[key]
            return replay() if replay else self._step(model, count)
        self._warm_up(model, count)
        try:
            self.replays[key] = self._capture(model, count)
        except RuntimeError as error:
            log.warning("continuing without a CUDA graph: %s", str(error).split("\n")[0])
            self.replays[key] = None

    def _step(self, model: "TokenShuffleModel", count: int) -> None:
        self.decoding.step(model, count)
        self.finished.copy_(self.decoding.finished(), non_blocking=True)

    def _warm_up(self, model: "TokenShuffleModel", count: int) -> None:
        """A step like any other, in which libraries allocate workspaces for the stream: those that
        they allocate in a capture may go with its graph."""
        if self.stream is None:
            return self._step(model, count)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._step(model, count)
        current.wait_stream(self.stream)

    def _capture(self, model: "TokenShuffleModel", count: int) -> Callable[[], None]:
        """A function that repeats a step of `count` windows; capturing it changes nothing."""
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        try:
            # Other threads of a host may keep using CUDA.
            with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
                self._step(model, count)
        finally:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream set
        return graph.replay

    def _mark(self) -> Callable[[], None]:
        """A function that waits until the device has come here."""
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


Key = tuple["Shape", tuple[int, ...]]  # with the addresses of the weights
KEPT: "WeakKeyDictionary[nn.Module, tuple[Key, CapturedSteps]]" = WeakKeyDictionary()


def steps(
    model: "TokenShuffleModel", shape: "Shape", pace: Pace, new: Callable[..., "Decoding"]
) -> CapturedSteps | None:
    """The steps of the picture before, if they fit this `shape`, or those of `new(cache class)`.

    They belong to one picture until it is finished, since two threads may draw with one model. None
    without CUDA, on a device other than the current one, and if weights are on another device, as a
    host with a small GPU may have them.
    """
    device = shape.device
    if not on_current_gpu(device):
        return None
    if any(weight.device != device for weight in model.parameters()):
        _say_once("some weights are not on the GPU: steps run without a CUDA graph")
        return None
    return take(model, shape, pace) or CapturedSteps(new(StaticCache), pace)


def take(model: "TokenShuffleModel", shape: "Shape", pace: Pace) -> CapturedSteps | None:
    """What was kept for `model`; None, and nothing kept, if it does not fit."""
    key, kept = KEPT.pop(model, (None, None))
    if key != _key(model, shape) or kept.decoding.ahead < pace.most:
        return None
    kept.pace = pace
    return kept


def on_current_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and device.index == torch.cuda.current_device()


def kept_nbytes(model: nn.Module) -> int:
    _, kept = KEPT.get(model, (None, None))
    return kept.decoding.nbytes if kept else 0


def _key(model: nn.Module, shape: "Shape") -> Key:
    return shape, addresses(model)


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Of the weights in memory."""
    return tuple(weight.data_ptr() for weight in model.parameters())


@cache
def _say_once(text: str) -> None:
    log.info(text)
