"""The quality that quantised weights cost the bundled model.

    python -m benchmarks.quality DATA --json quality.json

DATA is a folder of `tokenshuffle data emoji --compositions N`. The scores are those of
`tokenshuffle eval`: the loss on held-out compositions, and the share of pictures whose nearest
reference is the prompted one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tokenshuffle_core.config import WEIGHT_KINDS

from .measure import write_rows

SCORES = {"loss": ("nats per code",), "retrieval": ("trained top-1", "held-out top-1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    write_rows(HEADER, line, rows(options), options.json)


def rows(options) -> Iterator[dict]:
    for weights, score in product((None, *WEIGHT_KINDS), SCORES):
        data = options.data / "composed" if score == "loss" else options.data
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.json"
            command = [sys.executable, "-m", "tokenshuffle_core", "eval", score, data]
            command += ["--device", options.device, "--count", str(options.count), "--json", path]
            command += ["--weights", weights] if weights else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results = json.loads(path.read_text(encoding="utf-8"))["results"]
        for name in SCORES[score]:
            yield {"weights": weights or "as stored", "score": name} | results[name]


HEADER = "| weights | score | | 95 % interval | n |\n| --- | --- | --- | --- | --- |"


def line(row: dict) -> str:
    interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    return f"| {row['weights']} | {row['score']} | {row['value']:.4g} | {interval} | {row['n']} |"


if __name__ == "__main__":
    main()
