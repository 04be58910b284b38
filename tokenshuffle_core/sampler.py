"""Logits -> codes, and the sampling loop as a generator of finished windows."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import engine as engines
from .config import GenerationConfig, ModelConfig
from .guidance import filter_logits, guide, scale_at
from .model import TokenShuffleModel
from .noise import GumbelNoise
from .shuffle import shuffle, unshuffle
from .transformer import KVCache, Layout

LEAD = 3  # steps that may begin before the host knows which windows the first of them finished
COLDEST = 1e-20  # temperature: with a lower one, scores could overflow
PROMPT_UNIT = 64  # room for prompts is a multiple of it, so that most prompts share a `Shape`


@dataclass(frozen=True)
class Progress:
    """What is finished so far: `position` of `positions` windows of each picture, in raster order
    with `columns` in a row."""

    position: int
    positions: int
    columns: int
    windows: Tensor  # (B, at least positions, s, s) int64; the loop keeps writing into it

    @property
    def window(self) -> int:
        return self.windows.shape[2]

    @property
    def codes(self) -> Tensor:
        """(B, H, W) int64, 0 where unfinished."""
        finished = torch.arange(self.positions, device=self.windows.device) < self.position
        codes = self.windows[:, : self.positions] * finished[:, None, None]
        return unshuffle(codes.flatten(2).unflatten(1, (-1, self.columns)), self.window)[..., 0]


def sample_codes(
    logits: Tensor, settings: GenerationConfig, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One code from each distribution: logits and noise (B, n, V) -> codes (B, n) int64 and their
    logits (B, n, 1) float32, among which is any nan or inf, since it is larger than all numbers.

    Sampling uses the Gumbel-max trick, argmax of logits plus noise: unlike with an inverse CDF, a
    rounding error hardly ever changes the code. Temperature 0 is greedy and needs no noise.
    """
    scores = logits = logits.float()
    if settings.temperature:
        scores = logits / max(settings.temperature, COLDEST)
        scores = filter_logits(scores, settings.top_k, settings.top_p) + noise
    codes = scores.argmax(-1)
    return codes, logits.gather(-1, codes[..., None])


def sample_windows(
    model: TokenShuffleModel,
    window: int,
    settings: GenerationConfig,
    states: Tensor,
    noise: Tensor | None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Code states of n windows (B, n, s * s, d) -> their codes (B, n, s * s) int64, and () float32,
    the sum of the logits of these.

    With the guidance `scale` (n,) of each, the states are (2 B, n, s * s, d), conditional ones
    first. With a window head, codes are sampled autoregressively within the window, otherwise all
    at once. `noise` is (B, n, s * s, V).
    """
    count = window**2
    together = 1 if model.window_head_of(window) else count
    shape = len(states) // (1 if scale is None else 2), *states.shape[1:3]
    codes = torch.zeros(shape, dtype=torch.int64, device=states.device)
    chosen = []
    for first in range(0, count, together):
        part = slice(first, first + together)
        seen = codes if scale is None else torch.cat([codes, codes])
        x = model.head_states(states[:, :, part], window, seen, first)
        if scale is not None:  # equal to guiding the logits, as the head is linear, but cheaper
            x = guide(*x.float().chunk(2), scale[:, None, None]).to(x.dtype)
        drawn = None if noise is None else noise[:, :, part]
        codes[:, :, part], logits = sample_codes(model.head(x), settings, drawn)
        chosen.append(logits)
    return codes, torch.cat(chosen, 2).sum()


@dataclass(frozen=True)
class Shape:
    """All that the memory and the operations of a step depend on, beside the model: `grid` is
    (rows, columns) in windows, `prompt` the room for text tokens."""

    batch: int
    grid: tuple[int, int]
    window: int
    prompt: int
    layout: Layout | None
    settings: GenerationConfig
    has_given: bool
    dtype: torch.dtype
    device: torch.device
    row_ends: bool = False

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        """Of the transformer's batch: with guidance, each picture also has an unconditional one."""
        return self.batch * (1 if self.settings.cfg == 1 else 2)

    def place(self, window: int | Tensor) -> int | Tensor:
        """Where a window is in the sequence of the picture, in which each row but the last may be
        followed by its end."""
        return window + window // self.grid[1] if self.row_ends else window

    def appended(self, done: int | Tensor, count: int | Tensor) -> int | Tensor:
        """The tokens that a step appends for `count` windows after `done` finished ones."""
        if not self.row_ends:
            return count
        return self.place(done + count - 1) - self.place(done - 1)

    def tokens(self, count: int) -> int:
        """The most that a step of so many windows appends, wherever it starts."""
        return count + (-(-count // self.grid[1]) if self.row_ends else 0)


class Decoding:
    """The state of a batch of pictures while it is sampled, on one device.

    A step depends on nothing else and asks the host nothing, so that it can be captured once and
    repeated; for the same reason, what differs between pictures of one `Shape` is kept in the same
    memory. `ahead` is the most windows that a step samples. `done` () int64 counts the finished
    windows. `codes` (B, windows, s, s) int64 are the finished ones, then the guesses of the next
    steps; they end a few windows behind the picture. `logits` () float32 is the sum of those of all
    codes so far.
    """

    lead = LEAD

    def __init__(
        self, config: ModelConfig, shape: Shape, ahead: int, cache: type[KVCache] = KVCache
    ):
        self.shape, self.ahead, device = shape, ahead, shape.device
        settings, window, positions = shape.settings, shape.window, shape.positions
        padding = torch.zeros(shape.rows, dtype=torch.int64, device=device)
        capacity = shape.prompt + shape.place(positions) + shape.tokens(ahead)
        self.cache = cache(config, padding, capacity, shape.dtype, shape.layout)
        self.offsets = torch.arange(2 * ahead, device=device)
        self.done = torch.zeros((), dtype=torch.int64, device=device)
        self.logits = torch.zeros((), device=device)
        windows = positions + 2 * ahead
        self.codes = torch.zeros(
            shape.batch, windows, window, window, dtype=torch.int64, device=device
        )
        self.kept = torch.zeros(windows, dtype=torch.bool, device=device)
        self.noise = self.scales = None
        if settings.temperature:
            noise = window**2, config.codebook_size
            self.noise = GumbelNoise(shape.batch, noise, LEAD * ahead, device)
        if settings.cfg != 1:
            places = [min(i, positions - 1) for i in range(positions + ahead)]
            scales = [scale_at(settings.schedule, settings.cfg, i, positions) for i in places]
            self.scales = torch.tensor(scales, device=device)

    @property
    def nbytes(self) -> int:
        noise = [] if self.noise is None else [self.noise.memory]
        parts = *self.cache.keys, *self.cache.values, self.codes, *noise
        return sum(part.nbytes for part in parts)

    def start(
        self,
        model: TokenShuffleModel,
        text: Tensor,
        padding: Tensor,
        given: Tensor | None,
        generators: list[torch.Generator],
    ) -> tuple[int, int]:
        """Run the prompts and sample the first window after the full rows of given codes at the
        top. Returns how many windows those rows have, and how many are finished now."""
        window, positions = self.shape.window, self.shape.positions
        self.cache.start(padding)
        self.codes.zero_()
        done = 0
        if given is not None:
            self.codes[:, :positions] = shuffle(given[..., None], window).view(
                -1, positions, window, window
            )
            self.kept[:positions] = self.codes[0, :positions, 0, 0] >= 0
            self.codes.clamp_(min=0)
            first = int(self.kept.int().cumprod(0).sum())
            done = first // self.shape.grid[1] * self.shape.grid[1]
        self.done.fill_(done)
        self.logits.zero_()
        if self.noise:
            self.noise.start(generators)
        states = model.prefill(self.cache, text, window)
        if done == positions:
            return done, done
        if done:
            places = torch.arange(self.shape.place(done), device=self.done.device)
            states = self._append(model, places)[:, -1:]
        self.draw(done + 1)
        self._sample(model, states, self.done + self.offsets[:1], 0)
        return done, self.checked(float(self.finished()))

    def finished(self) -> Tensor:
        """One number for the host to read, () float32: `done`, or nan once logits were not finite,
        since 0 times their sum is nan."""
        return torch.add(self.done, self.logits, alpha=0)

    @staticmethod
    def checked(finished: float) -> int:
        """What the host has read. Raises ValueError where logits were not finite."""
        if math.isnan(finished):
            raise ValueError(
                "the model's logits are not finite, so there is no picture: a LoRA may be too "
                "strong, or the weights too large for 16 bits"
            )
        return int(finished)

    def draw(self, windows: int) -> None:
        """Draw the noise of so many windows from the first one on."""
        if self.noise:
            self.noise.draw(windows)

    def step(self, model: TokenShuffleModel, count: int, done: int | None = None) -> None:
        """Sample `count` windows from the first unfinished one on; their noise must be drawn.

        The first depends on finished codes, the others on guesses. All windows up to the first
        wrong guess are finished. `done`, if the host knows it, saves tokens after the last window.
        """
        shape, index = self.shape, self.done + self.offsets[:count]
        if not shape.row_ends:
            return self._sample(model, self._append(model, index - 1), index, count)
        first = shape.place(self.done - 1)
        tokens = shape.tokens(count) if done is None else shape.appended(done, count)
        states = self._append(model, first + self.offsets[:tokens])
        states = states.index_select(1, shape.place(index) - 1 - first)
        self._sample(model, states, index, tokens)

    def _append(self, model: TokenShuffleModel, places: Tensor) -> Tensor:
        """Append what is at these places of the picture's sequence. Returns the code states
        (rows, n, s * s, d) of the window after each."""
        row_ends, index, columns = None, places, self.shape.grid[1]
        if self.shape.row_ends:
            row_ends = places % (columns + 1) == columns
            index = places - places // (columns + 1)
        codes = self.codes.index_select(1, index)
        return model.step(self.cache, codes, self.shape.window, row_ends)

    def _sample(self, model: TokenShuffleModel, states: Tensor, index: Tensor, fed: int) -> None:
        """From the code states of the windows `index`, for which a step has `fed` tokens."""
        shape, count = self.shape, len(index)
        noise = None if self.noise is None else self.noise.at(index)
        scale = None if self.scales is None else self.scales.index_select(0, index)
        settings = shape.settings
        codes, logits = sample_windows(model, shape.window, settings, states, noise, scale)
        self.logits += logits
        codes = codes.view(-1, count, shape.window, shape.window)
        if shape.has_given:
            codes = self._unless_kept(index, codes)
        finished = (shape.positions - self.done).clamp_(max=1)
        if count > 1:
            guesses = self.codes.index_select(1, index[:-1])
            right = (codes[:, :-1] == guesses).flatten(2).all(2).all(0)
            finished = torch.minimum(1 + right.cumprod(0).sum(), shape.positions - self.done)
        self.codes.index_copy_(1, index, codes)
        if self.ahead > 1:  # first guess of a window: the one before it
            after = index[-1:] + 1 + self.offsets[: self.ahead]
            guess = codes[:, -1:].expand(-1, self.ahead, -1, -1)
            guess = self._unless_kept(after, guess) if shape.has_given else guess
            self.codes.index_copy_(1, after, guess)
        if fed > 1:  # keep what is before the last finished window
            self.cache.drop(fed - shape.appended(self.done, finished))
        self.done += finished

    def _unless_kept(self, index: Tensor, codes: Tensor) -> Tensor:
        kept = self.kept.index_select(0, index)[:, None, None]
        return torch.where(kept, self.codes.index_select(1, index), codes)


class Steps:
    """The steps of a picture one after another, each of as many windows as `pace` says. `threads`
    is a context for a step of so many rows."""

    def __init__(
        self,
        decoding: Decoding,
        pace: engines.Pace,
        threads: Callable[[int], AbstractContextManager] = nullcontext,
    ):
        self.decoding, self.pace, self.threads = decoding, pace, threads

    def advance(self, model: TokenShuffleModel, done: int) -> int:
        """Take a step, with `done` windows finished before it. Returns how many are after it."""
        count = min(self.pace.count, self.decoding.shape.positions - done)
        self.decoding.draw(done + count)
        started = time.perf_counter()
        with self.threads(self.decoding.shape.rows * count):
            self.decoding.step(model, count, done)
        finished = self.decoding.checked(float(self.decoding.finished()))
        self.pace.note(count, finished - done, time.perf_counter() - started)
        return finished

    def stop(self, model: TokenShuffleModel, done: int) -> None:
        """The picture is finished, or given up: here, nothing is under way or to be kept."""


@torch.inference_mode()
def sample(
    model: TokenShuffleModel,
    prompts: list[list[int]],
    negatives: list[list[int]],
    grid: tuple[int, int],
    settings: GenerationConfig,
    generators: list[torch.Generator],
    pad: int,
    given: Tensor | None = None,
    ahead: int | None = None,
    engine: bool = True,
) -> Iterator[Progress]:
    """Sample pictures window by window, a whole batch in lockstep. Yields after each window, and
    once after the full rows of given codes at the top.

    prompts and negatives hold one list of framed ids per picture; `grid` is (rows, columns) in
    windows; `given` (B, H, W) int64 holds codes to keep, with -1 in the windows to sample, which
    are the same in each picture. A window sees the given codes before it in raster order, not those
    after it. With cfg 1 the negatives are not run. Everything runs on the generators' device.

    A step samples `ahead` windows (Jacobi decoding, arXiv 2305.10427): the first from finished
    codes, the others from guesses. The noise of a window is fixed, so a guess that equals the
    window sampled in its place is correct, and all windows up to the first wrong guess are
    finished: they equal those of steps of one window, up to rounding. None leaves the number to the
    engine, which makes steps faster without changing the pictures; `engine` False is the plain loop
    over the plain model. Raises ValueError where logits are not finite.
    """
    device = torch.empty(0, device=generators[0].device).device  # with its index
    window = settings.window or model.config.window
    if engine:
        engines.prepare(model, device)
    else:
        engines.release(model)
    text, padding = pad_left(prompts + negatives if settings.cfg != 1 else prompts, pad, device)
    shape = Shape(
        batch=len(prompts),
        grid=grid,
        window=window,
        prompt=-(-text.shape[1] // PROMPT_UNIT) * PROMPT_UNIT,
        layout=model.layout(text.shape[1], grid[1] * window, window),
        settings=settings,
        has_given=given is not None,
        dtype=model.code_embedding.weight.dtype,
        device=device,
        row_ends=model.config.row_end is not None,
    )
    pace = engines.pace(model, shape) if engine and not ahead else engines.Pace(ahead or 1)
    new = partial(Decoding, model.config, shape, pace.most)
    threads = engines.threads(model, device) if engine else nullcontext
    steps = (engine and engines.steps(model, shape, pace, new)) or Steps(new(), pace, threads)
    decoding, positions = steps.decoding, shape.positions
    with threads(text.numel() + (0 if given is None else shape.rows * positions)):
        first, done = decoding.start(model, text, padding, given, generators)
    if first:
        yield Progress(first, positions, grid[1], decoding.codes.clone())
    try:
        while True:
            # The next picture may reuse the memory, but the last result stays as it is.
            codes = decoding.codes.clone() if done == positions else decoding.codes
            for position in range(first + 1, done + 1):
                yield Progress(position, positions, grid[1], codes)
            if done == positions:
                return
            first, done = done, steps.advance(model, done)
    finally:
        steps.stop(model, done)


def pad_left(rows: list[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B, T) padded on the left, and the padding tokens of each row (B,)."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    return ids, torch.tensor([length - len(row) for row in rows], device=device)
