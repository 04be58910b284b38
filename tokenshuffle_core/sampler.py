"""Logits -> codes, and the sampling loop as a generator of finished windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import engine as engines
from .config import GenerationConfig
from .guidance import guide, scale_at
from .model import TokenShuffleModel
from .shuffle import shuffle


@dataclass(frozen=True)
class Progress:
    """What is finished so far: `position` of `positions` windows of each picture."""

    position: int
    positions: int
    window: int
    codes: Tensor  # (B, H, W) int64, 0 where unfinished; the loop keeps writing into it


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with -inf outside the top k and outside the nucleus of mass p.

    0 and 1 turn the filters off. The nucleus (arXiv 1904.09751) is the smallest set of most
    likely codes whose probabilities reach `top_p`; the most likely code always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        removed = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def draw_noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Exponential noise (len(generators), *shape); row i draws from generators[i] alone.

    It matches `exponential_` on some CPUs, but is identical on all of them, and faster.
    """
    exact = generators[0].device.type in ("cpu", "cuda")
    dtype = torch.float64 if exact else torch.float32
    uniform = [
        torch.empty(shape, dtype=dtype, device=generator.device).uniform_(generator=generator)
        for generator in generators
    ]
    return torch.stack(uniform).neg_().log1p_().neg_().float()


def sample_codes(logits: Tensor, settings: GenerationConfig, noise: Tensor) -> Tensor:
    """One code from each distribution: logits and noise (B, n, V) -> codes (B, n) int64.

    Sampling uses the Gumbel-max trick, argmax of logits plus noise: unlike with an inverse CDF, a
    rounding error hardly ever changes the code. Temperature 0 is greedy.
    """
    logits = logits.float()
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits / settings.temperature, settings.top_k, settings.top_p)
    # Noise of exactly 0 would become infinite here, and nan for a code that is filtered out.
    return (logits - noise.clamp_min(2**-25).log()).argmax(-1)


def sample_windows(
    model: TokenShuffleModel,
    window: int,
    settings: GenerationConfig,
    states: Tensor,
    noise: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Code states of n windows (B, n, s * s, d) -> their codes (B, n, s * s) int64.

    With the guidance `scale` (n,) of each, the states are (2 B, n, s * s, d), conditional ones
    first. With a window head, codes are sampled autoregressively within the window, otherwise all
    at once. `noise` is (B, n, s * s, V).
    """
    count = window**2
    together = 1 if model.window_head_of(window) else count
    codes = torch.zeros(noise.shape[:3], dtype=torch.int64, device=noise.device)
    for first in range(0, count, together):
        part = slice(first, first + together)
        seen = codes if scale is None else torch.cat([codes, codes])
        x = model.head_states(states[:, :, part], window, seen, first)
        if scale is not None:  # equal to guiding the logits, as the head is linear, but cheaper
            x = guide(*x.float().chunk(2), scale[:, None, None]).to(x.dtype)
        codes[:, :, part] = sample_codes(model.head(x), settings, noise[:, :, part])
    return codes


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
    over the plain model.
    """
    rows, columns = grid
    window, positions = settings.window or model.config.window, rows * columns
    batch, device = len(prompts), generators[0].device
    if engine:
        engines.prepare(model, device)
        ahead = ahead or engines.windows_ahead(model, device, batch)
    else:
        engines.release(model)
        ahead = ahead or 1
    noise_shape = (window**2, model.config.codebook_size)
    picture = torch.zeros(batch, rows * window, columns * window, dtype=torch.int64, device=device)
    # All windows (B, positions, s, s): finished codes, then guesses; 0 or -1 before a first guess.
    codes = torch.zeros(batch, positions, window, window, dtype=torch.int64, device=device)
    kept, done = None, 0
    if given is not None:
        codes += shuffle(given[..., None], window).view_as(codes)
        kept = codes[:1, :, :1, :1] >= 0
        done = int(kept.flatten().int().cumprod(0).sum()) // columns * columns
    scales = None
    if guided := settings.cfg != 1:
        scales = [scale_at(settings.schedule, settings.cfg, i, positions) for i in range(positions)]
        scales = torch.tensor(scales, device=device)
    text, padding = pad_left(prompts + negatives if guided else prompts, pad, device)
    layout = model.layout(text.shape[1], columns * window, window)
    cache, states = model.prefill(text, padding, positions - 1, window, layout)
    if done:
        picture[:, : done // columns * window] = given[:, : done // columns * window]
        for _ in range(done):  # so that a window's noise does not depend on where sampling starts
            draw_noise(noise_shape, generators)
        yield Progress(done, positions, window, picture)
        if done < positions:
            states = model.step(cache, codes[:, :done], window)[:, -1:]
    sample_step = partial(sample_windows, model, window, settings)
    step = partial(model.step, cache, window=window)
    if engine and (graphs := engines.capture(model, cache, window, ahead, sample_step)):
        sample_step, step, cache = graphs
    noise = torch.empty(batch, 0, *noise_shape, device=device)
    while done < positions:  # `states` belong to the windows from `done` on
        end = done + states.shape[1]
        while noise.shape[1] < end - done:
            noise = torch.cat([noise, draw_noise(noise_shape, generators)[:, None]], 1)
        scale = scales[done:end] if guided else None
        sampled = sample_step(states, noise, scale).view(batch, -1, window, window)
        if kept is not None:
            sampled = torch.where(kept[:, done:end], codes[:, done:end], sampled)
        finished = 1
        if end - done > 1:
            correct = (sampled[:, :-1] == codes[:, done : end - 1]).flatten(2).all(2).all(0)
            finished += int(correct.int().cumprod(0).sum())
        codes[:, done:end] = sampled
        cache.drop(end - done - finished)
        noise = noise[:, finished:]
        for _ in range(finished):
            top, left = done // columns * window, done % columns * window
            picture[:, top : top + window, left : left + window] = codes[:, done]
            done += 1
            yield Progress(done, positions, window, picture)
        count = min(ahead, positions - done)
        if count:
            for i in range(end, done + count - 1):  # first guess: the window before it
                if kept is None or not kept[0, i]:
                    codes[:, i] = codes[:, i - 1]
            states = step(codes[:, done - 1 : done - 1 + count])


def pad_left(rows: list[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B, T) padded on the left, and the padding tokens of each row (B,)."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    return ids, torch.tensor([length - len(row) for row in rows], device=device)
