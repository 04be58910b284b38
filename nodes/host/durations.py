"""How long the last pictures took, from which the page estimates the next one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# checkpoint -> (window, pictures at once) -> positions and seconds of the last sampling
SAMPLED: dict[str, dict[tuple[int, int], tuple[int, float]]] = {}
DECODED: dict[str, tuple[int, float]] = {}  # checkpoint -> pixels and seconds of the last decoding


def note_sampled(name: str, window: int, pictures: int, positions: int, seconds: float) -> None:
    SAMPLED.setdefault(name, {})[window, pictures] = positions, seconds


@contextmanager
def decoding(name: str, pixels: int) -> Iterator[None]:
    """Notes the seconds that are spent inside."""
    started = time.perf_counter()
    yield
    DECODED[name] = pixels, time.perf_counter() - started


def durations(name: str) -> dict:
    """{"sampled": [[window, pictures, positions, seconds], ...], "decoded": [pixels, seconds] or
    None} of a checkpoint."""
    sampled = SAMPLED.get(name, {})
    return {
        "sampled": [[*kind, *found] for kind, found in sampled.items()],
        "decoded": DECODED.get(name),
    }
