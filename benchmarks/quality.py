"""What weights of one byte cost in quality, by the bundled model.

    python -m benchmarks.quality DATA --json quality.json

DATA is a folder of `tokenshuffle data emoji --compositions N`. The scores are those of
`tokenshuffle eval`: the loss on held-out compositions, and how often the nearest picture is the
prompted one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenshuffle_core.config import WEIGHT_KINDS

SCORES = {
    "loss": ("nats per code",),
    "retrieval": ("trained top-1", "held-out top-1"),
}


@dataclass
class Row:
    """One line of the table: a score and the ends of its 95 % interval, if it has one."""

    weights: str
    score: str
    value: float
    low: float | None
    high: float | None
    n: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(HEADER)
    rows = []
    for weights in (None, *WEIGHT_KINDS):
        for score, names in SCORES.items():
            results = evaluate(options, score, weights)
            for name in names:
                rows.append(Row(weights or "as stored", name, **results[name]))
                print(line(rows[-1]), flush=True)
    if options.json:
        values = {"rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(values, indent=1) + "\n")


def evaluate(options, score: str, weights: str | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        data = options.data / "composed" if score == "loss" else options.data
        command = [sys.executable, "-m", "tokenshuffle_core", "eval", score, data]
        command += ["--device", options.device, "--count", str(options.count), "--json", path]
        command += ["--weights", weights] if weights else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text(encoding="utf-8"))["results"]


HEADER = "| weights | score | | 95 % interval | n |\n| --- | --- | --- | --- | --- |"


def line(row: Row) -> str:
    interval = "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"
    return f"| {row.weights} | {row.score} | {row.value:.4g} | {interval} | {row.n} |"


if __name__ == "__main__":
    main()
