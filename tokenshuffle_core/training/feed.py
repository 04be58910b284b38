"""What a step of the model trains on, ready before the step before it ends.

The whole batch is drawn on the host, from (seed, step) alone: pictures, captions, which of them are
dropped, which windows of the context are foreign. The codes of a set that is small enough are kept
on the GPU; those of a larger one, and on a CPU, stay memory-mapped.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.buckets import Size
from ..data.shards import CodeShards
from ..text_tokenizer import PromptEncoder
from .batches import Batches
from .captions import Captions
from .distributed import rank, world_size
from .loop import seed_of
from .settings import LoopConfig, Recipe

RESIDENT_SHARE = 0.1  # of a GPU's free memory that codes may take
COMPILED_MULTIPLE = 16  # of the length of texts, where each length is compiled


class Draw(NamedTuple):
    """The batch of a step, but for its codes: one size, one window."""

    window: int
    size: Size
    indices: Tensor  # (B,) int64, of pictures
    text: Tensor  # (B, T) int32
    padding: Tensor  # (B,) int64
    foreign: Tensor | None  # (B, rows, columns) bool: windows of the context


class Piece(NamedTuple):
    """The part of a batch that is computed at once, on the device."""

    window: int
    text: Tensor  # (b, T) int64
    padding: Tensor  # (b,) int64
    codes: Tensor  # (b, H, W) int64
    context: Tensor  # (b, H, W) int64
    predicted: float  # text tokens that are predicted, in a mean piece of the step


class Feed:
    """Batches of the pictures of `shards`. Raises as `PromptEncoder.encode` for captions."""

    def __init__(
        self,
        shards: CodeShards,
        tokenizer: PromptEncoder,
        longest: int,
        windows: tuple[int, ...],
        loop: LoopConfig,
        recipe: Recipe,
        device: torch.device,
    ):
        self.shards, self.windows, self.recipe, self.device = shards, windows, recipe, device
        self.seed = loop.seed
        self.multiple = COMPILED_MULTIPLE if loop.compile else 1
        mix = np.array(recipe.window_mix or [1] * len(windows), dtype=float)
        self.mix = mix / mix.sum()
        repeats = np.zeros(len(shards), dtype=np.int64)  # 0: held out

        def captions():
            for index in range(len(shards)):
                record = shards.record(index)
                if record["split"] == "train":
                    repeats[index] = record["repeats"]
                yield record["captions"]

        self.captions = Captions(captions(), tokenizer, longest)
        self.visits = {}  # size -> indices, repeated as an epoch visits them
        for size, indices in shards.indices.items():
            visits = indices.repeat_interleave(torch.from_numpy(repeats)[indices])
            if len(visits):
                self.visits[size] = visits
        self.trained = [i for visits in self.visits.values() for i in visits.unique().tolist()]
        self.held_out = [
            i for indices in shards.indices.values() for i in indices.tolist() if not repeats[i]
        ]
        self.batches = Batches(list(self.visits.values()), loop.batch, loop.seed)
        self.resident = resident_codes(shards, device) if _fits(shards, device) else None
        self.drawn: tuple[int, Draw] | None = None  # the pieces of a step share it
        self.ahead = Ahead(self._load, _next)

    def draw(self, step: int) -> Draw:
        """The batch of step `step`."""
        random = np.random.default_rng(seed_of(self.seed + 3, step))
        number, indices = self.batches.at(step)
        size = list(self.visits)[number]
        window = int(random.choice(self.windows, p=self.mix))
        pixels = self.shards.stride * window
        columns, rows = (side // pixels for side in size)
        pictures, count = indices.numpy(), len(indices)
        first, last = self.captions.first[pictures], self.captions.first[pictures + 1]
        captions = first + (random.random(count) * (last - first)).astype(np.int64)
        captions[random.random(count) < self.recipe.drop_prompt] = -1
        foreign = None
        if self.recipe.context_noise:
            share = self.recipe.context_noise * random.random((count, 1, 1), dtype=np.float32)
            foreign = random.random((count, rows, columns), dtype=np.float32) < share
            foreign = torch.from_numpy(foreign)
        text, padding = self.captions.rows(captions, (rows, columns), self.multiple, pixels)
        return Draw(window, size, indices, text, padding, foreign)

    def piece(self, step: int, piece: int, pieces: int) -> Piece:
        """The pictures [piece::pieces] of the batch of step `step`."""
        draw, tensors = self.ahead(step, piece, pieces)
        text, padding, codes, others, foreign = (
            tensor if tensor is None else tensor.to(self.device, non_blocking=True)
            for tensor in tensors
        )
        if self.resident is not None:
            codes, others = (
                places if places is None else self.resident[draw.size][places]
                for places in (codes, others)
            )
        codes = codes.long()
        context = codes
        if foreign is not None:
            others = codes.roll(1, 0) if others is None else others.long()
            context = with_foreign(codes, others, foreign, draw.window)
        predicted = float((draw.text.shape[1] - 1 - draw.padding.numpy()).sum()) / pieces
        return Piece(draw.window, text.long(), padding, codes, context, predicted)

    def _load(self, step: int, piece: int, pieces: int) -> tuple[Draw, list[Tensor | None]]:
        """The step's draw, and what goes to the device: text, padding, codes, those of each
        picture's neighbour in the batch and which windows are foreign. For codes that are on the
        device, their places there."""
        if self.drawn is None or self.drawn[0] != step:
            self.drawn = step, self.draw(step)
        draw = self.drawn[1]
        neighbours = None  # of a whole batch: the same pictures
        if draw.foreign is not None and pieces > 1:
            neighbours = draw.indices.roll(1)
        text, padding, codes, others, foreign = (
            whole if whole is None else whole[piece::pieces].contiguous()
            for whole in (draw.text, draw.padding, draw.indices, neighbours, draw.foreign)
        )
        if self.resident is None:
            read = self.shards.gather
        else:
            of_size = self.shards.indices[draw.size]

            def read(indices: Tensor) -> Tensor:
                return torch.searchsorted(of_size, indices)

        codes, others = (each if each is None else read(each) for each in (codes, others))
        tensors = [text, padding, codes, others, foreign]
        if self.device.type == "cuda":  # from where a copy does not wait
            tensors = [each if each is None else each.pin_memory() for each in tensors]
        return draw, tensors


def with_foreign(codes: Tensor, others: Tensor, foreign: Tensor, window: int) -> Tensor:
    """Codes (B, H, W) with the `foreign` windows (B, rows, columns) from `others`, each picture's
    neighbour in the batch.

    Otherwise a model memorises a small data set: it learns to recognise the picture by its first
    windows and to ignore the prompt, and one wrong window while sampling leads it into another
    picture. A large data set does not need this. The idea comes from scheduled sampling (arXiv
    1506.03099). The share of foreign windows differs from picture to picture, from 0 to
    `context_noise`, so that the model still trusts a clean context.
    """
    foreign = foreign.repeat_interleave(window, 1).repeat_interleave(window, 2)
    return torch.where(foreign, others, codes)


class Ahead:
    """make(*key), which a thread has already computed where `key` is what follows the last one."""

    def __init__(self, make: Callable, following: Callable[..., tuple]):
        self.make, self.following = make, following
        self.thread = ThreadPoolExecutor(1)
        self.key, self.future = None, None

    def __call__(self, *key) -> Any:
        future = self.future if key == self.key else self.thread.submit(self.make, *key)
        made = future.result()
        self.key = self.following(*key)
        self.future = self.thread.submit(self.make, *self.key)
        return made


def _next(step: int, piece: int, pieces: int) -> tuple[int, int, int]:
    """The piece that this process trains on after another one."""
    piece += world_size()
    return (step, piece, pieces) if piece < pieces else (step + 1, rank(), pieces)


def resident_codes(shards: CodeShards, device: torch.device) -> dict[Size, Tensor]:
    """The codes of all pictures of each size (N, H, W) on the device, in the order of
    `shards.indices`."""
    return {
        size: torch.cat([shards.gather(part).to(device) for part in indices.split(4096)])
        for size, indices in shards.indices.items()
        if len(indices)
    }


def _fits(shards: CodeShards, device: torch.device) -> bool:
    """Whether the codes may live on the device."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return shards.nbytes < RESIDENT_SHARE * free
