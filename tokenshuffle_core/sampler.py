"""Logits -> codes, and the decode loop as a generator of finished windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .config import GenerationConfig
from .engine import capture
from .guidance import guide, scale_at
from .model import TokenShuffleModel
from .shuffle import unshuffle


@dataclass(frozen=True)
class Progress:
    """What is finished so far: `position` of `positions` windows of each picture."""

    position: int
    positions: int
    window: int
    codes: Tensor  # (B, H, W) int64, 0 where unfinished; the loop goes on writing into it


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (..., V) with everything outside the top k and the nucleus of mass p at -inf.

    0 and 1 turn the filters off. The nucleus (arXiv 1904.09751) is the smallest set of most
    likely codes whose probabilities reach `top_p`; the most likely code always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        removed = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def draw_noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Exponential noise (len(generators), *shape); row i draws from generators[i] alone."""
    return torch.stack(
        [
            torch.empty(shape, device=generator.device).exponential_(generator=generator)
            for generator in generators
        ]
    )


def sample_codes(logits: Tensor, settings: GenerationConfig, noise: Tensor) -> Tensor:
    """One code from each distribution: logits (B, n, V), noise of that shape -> codes (B, n) int64.

    Sampling is the Gumbel-max trick: argmax of logits plus noise, which unlike an inverse CDF
    hardly ever turns a rounding error into another code. Temperature 0 is greedy.
    """
    logits = logits.float()
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits / settings.temperature, settings.top_k, settings.top_p)
    # A draw of exactly 0 would be infinite noise, and nan for a code that is filtered out.
    return (logits - noise.clamp_min(2**-25).log()).argmax(-1)


def sample_window(
    model: TokenShuffleModel,
    window: int,
    settings: GenerationConfig,
    states: Tensor,
    noise: Tensor,
    scale: float | Tensor | None = None,
) -> Tensor:
    """Code states of a window (B, s * s, d) -> its codes (B, s * s) int64.

    With a guidance `scale` the states are (2 B, s * s, d), conditional ones first. All codes of the
    window at once, or one after another where the model has a head for that. `noise` is
    (B, s * s, V).
    """
    count = window**2
    together = 1 if model.window_head_of(window) else count
    codes = torch.zeros(noise.shape[:2], dtype=torch.int64, device=noise.device)
    for first in range(0, count, together):
        part = slice(first, first + together)
        chosen = codes if scale is None else torch.cat([codes, codes])
        x = model.head_states(states[:, part], window, chosen, first)
        if scale is not None:  # the head is linear: before it there is less to compute
            x = guide(*x.float().chunk(2), scale).to(x.dtype)
        codes[:, part] = sample_codes(model.head(x), settings, noise[:, part])
    return codes


@torch.inference_mode()
def decode(
    model: TokenShuffleModel,
    prompts: list[list[int]],
    negatives: list[list[int]],
    grid: tuple[int, int],
    settings: GenerationConfig,
    generators: list[torch.Generator],
    pad: int,
    given: Tensor | None = None,
    graphs: bool = True,
) -> Iterator[Progress]:
    """Sample pictures window by window, all of a batch in step; yields after each window, and once
    after the whole rows that are given at the top.

    prompts and negatives hold one list of framed ids per picture; `grid` is (rows, columns) in
    windows; `given` (B, H, W) int64 holds codes to keep, -1 in the windows to sample, which are the
    same in each picture. A window sees the given ones above it and to its left, not those to come.
    With cfg 1 the negatives are not run. Everything happens on the generators' device; `graphs`
    are CUDA's, where it has them (see engine.py).
    """
    rows, columns = grid
    window, windows = settings.window or model.config.window, rows * columns
    batch, device = len(prompts), generators[0].device
    noise_shape = (window**2, model.config.codebook_size)
    guided = settings.cfg != 1
    codes = torch.zeros(batch, rows * window, columns * window, dtype=torch.int64, device=device)
    text, padding = pad_left(prompts + negatives if guided else prompts, pad, device)
    cache, states = model.prefill(text, padding, windows - 1, window)
    done = 0
    kept = [False] * windows
    if given is not None:
        kept = (given[0, ::window, ::window] >= 0).flatten().tolist()
        done = (kept.index(False) if False in kept else windows) // columns * columns
    if done:
        known = given[:, : done // columns * window]
        codes[:, : known.shape[1]] = known
        for _ in range(done):  # the noise of a window does not depend on where sampling starts
            draw_noise(noise_shape, generators)
        yield Progress(done, windows, window, codes)
        if done < windows:
            states = model.step(cache, known, window)
    sample = partial(sample_window, model, window, settings)
    step = partial(model.step, cache, window=window)
    captured = capture(model, cache, window, sample) if graphs else None
    sample, step = captured or (sample, step)
    for position in range(done, windows):
        scale = scale_at(settings.schedule, settings.cfg, position, windows) if guided else None
        noise = draw_noise(noise_shape, generators)
        sampled = sample(states, noise, scale)
        top, left = position // columns * window, position % columns * window
        place = ..., slice(top, top + window), slice(left, left + window)
        fresh = unshuffle(sampled[:, None, None], window)[..., 0]  # (B, s, s)
        codes[place] = given[place] if kept[position] else fresh
        yield Progress(position + 1, windows, window, codes)
        if position + 1 < windows:
            states = step(codes[place])


def pad_left(rows: list[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids (B, T) padded at the left, and how many of each row are padding (B,)."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    return ids, torch.tensor([length - len(row) for row in rows], device=device)
