"""Classifier-free guidance (arXiv 2207.12598) and its schedules over the image's positions."""

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
