"""How long a picture takes beside other programs, each of which keeps one core busy.

    python -m benchmarks.busy --busy 0,1,2 [--models bundled,111m] [--json busy.json]

The fair share of n cores beside k such programs is n / (k + 1) cores: a picture may then take
k + 1 times as long as on an idle machine. "x fair" is the median time, relative to that; "all
threads" the same without the choice of threads (engine/threads.py). Random weights but for the
bundled model; sampling and decoding of one 128 px picture.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from tokenshuffle_core import engine
from tokenshuffle_core.pipeline import Pipeline, load

from .measure import busy_programs, machine, numbers, seconds_of, write_rows
from .models import SHAPES, random_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="bundled", help=f"of bundled, {', '.join(SHAPES)}")
    parser.add_argument("--busy", type=numbers, default="0,1,2", help="other programs")
    parser.add_argument("--pictures", type=int, default=1, help="at once")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    write_rows(HEADER, line, rows(options), options.json, **machine("cpu"))


def rows(options) -> Iterator[dict]:
    for name in options.models.split(","):
        pipeline = load() if name == "bundled" else random_pipeline(name, 2, "cpu")
        idle = None
        for count in options.busy:
            with busy_programs(count):
                found = measure(pipeline, options)
            idle = idle or found["chosen"]
            yield {"model": name, "busy": count, "fair": idle * (count + 1)} | found


def measure(pipeline: Pipeline, options) -> dict[str, float]:
    """Median seconds of a picture with chosen threads, and on all of them, in turn."""
    choice = engine.threads
    seconds: dict[str, list[float]] = {"chosen": [], "all": []}
    try:
        for i in range(options.rounds + 1):
            for kind, threads in (("chosen", choice), ("all", lambda *_: nullcontext)):
                engine.threads = threads
                seconds[kind].append(seconds_of(lambda i=i: draw(pipeline, i, options), "cpu"))
    finally:
        engine.threads = choice
    return {kind: statistics.median(each[1:]) for kind, each in seconds.items()}


def draw(pipeline: Pipeline, seed: int, options) -> torch.Tensor:
    return pipeline.generate("a red apple", seed=seed, count=options.pictures).images


HEADER = """\
| model | busy programs | seconds | x fair | all threads, seconds | x fair |
| --- | --- | --- | --- | --- | --- |"""


def line(row: dict) -> str:
    chosen, together, fair = row["chosen"], row["all"], row["fair"]
    cells = row["model"], row["busy"], chosen, chosen / fair, together, together / fair
    return f"| {' | '.join(f'{x:.3f}' if isinstance(x, float) else str(x) for x in cells)} |"


if __name__ == "__main__":
    main()
