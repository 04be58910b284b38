"""What is done to logits before sampling: classifier-free guidance (arXiv 2207.12598), with its
schedules over the image's positions, and filters."""

import torch
from torch import Tensor

from .checks import check_choice
from .config import SCHEDULES


def scale_at(schedule: str, cfg: float, position: int, positions: int) -> float:
    """The guidance scale for window `position` (0-based) of `positions`.

    "constant" is `cfg` everywhere. "linear" ramps from 1 at the first window to `cfg` at the
    last. "half-linear" ramps over the first half of the windows and stays at `cfg`: full guidance
    at the start, where the unconditional logits are fixed by the size tokens, causes artefacts that
    accumulate (arXiv 2504.17789). Raises ValueError for another schedule.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return cfg
    ramp = positions - 1 if schedule == "linear" else positions / 2
    progress = min(1.0, position / ramp) if ramp else 1.0
    return 1 + (cfg - 1) * progress


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """unconditional + scale * (conditional - unconditional), of logits or of a linear head's input,
    any shape."""
    return unconditional + scale * (conditional - unconditional)


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
