"""How long the last pictures took, from which the page estimates the next one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = 64  # of which the seconds are kept, the last ones noted
# checkpoint -> (window, pictures at once, positions) -> seconds of the last sampling
SAMPLED: dict[str, dict[tuple[int, int, int], float]] = {}
# checkpoint -> (pixels,) -> seconds of the last decoding
DECODED: dict[str, dict[tuple[int], float]] = {}


def note_sampled(name: str, window: int, pictures: int, positions: int, seconds: float) -> None:
    _note(SAMPLED.setdefault(name, {}), (window, pictures, positions), seconds)


@contextmanager
def decoding(name: str, pixels: int) -> Iterator[None]:
    """Notes the seconds that are spent inside."""
    started = time.perf_counter()
    yield
    _note(DECODED.setdefault(name, {}), (pixels,), time.perf_counter() - started)


def durations(name: str) -> dict[str, list[list[float]]]:
    """{"sampled": [[window, pictures, positions, seconds], ...], "decoded": [[pixels, seconds],
    ...]} of a checkpoint."""
    tables = {"sampled": SAMPLED, "decoded": DECODED}
    return {
        key: [[*kind, seconds] for kind, seconds in table.get(name, {}).items()]
        for key, table in tables.items()
    }


def _note(table: dict[tuple, float], kind: tuple, seconds: float) -> None:
    table.pop(kind, None)
    table[kind] = seconds
    if len(table) > KINDS:
        del table[next(iter(table))]
