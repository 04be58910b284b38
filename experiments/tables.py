"""The tables of docs/experiments.md, written from experiments/results.

python -m experiments.tables
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from benchmarks.measure import svg_plot
from tokenshuffle_core.evaluation.intervals import mean, proportion
from tokenshuffle_core.files import write_text
from tokenshuffle_core.training.stages import parse_toml

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
TIMES = RESULTS / "times.json"
DOCUMENT = ROOT.parent / "docs" / "experiments.md"
SEEDS = range(10)
OWN = ("rank", "size", "after", "parent")  # keys of a variant that a recipe does not have
SAMPLED = ("train", "held-out", "psnr")  # scores of sampled pictures
ORDER = ("windows", "compression", "fuse_blocks", "guidance", "elastic", "window_head", "growing")


@dataclass(frozen=True)
class Row:
    """A line of a table: a variant, sampled at one of its windows with some settings.

    `against` is the label of the row to compare it with, seed by seed.
    """

    label: str
    variant: str
    window: int | None = None
    generation: dict = field(default_factory=dict)
    against: str | None = None


@dataclass(frozen=True)
class Table:
    """`data` names the data sets; a model is trained on each of them separately."""

    title: str
    text: str
    data: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(name: str) -> Table:
    values = parse_toml(ROOT / f"{name}.toml")
    rows = tuple(Row(**row) for row in values["row"])
    return Table(values["title"], values["text"].strip(), tuple(values["data"]), rows)


@cache
def read_variants() -> dict:
    return parse_toml(ROOT / "variants.toml")


def recipe_values(variant: str, data: str) -> dict:
    """The recipe of the variant's training on `data`, with the keys of OWN."""
    variants = read_variants()
    shared, own = variants["shared"], dict(variants["variants"][variant])
    steps = round(own.pop("times", 1) * variants["data"][data]["steps"])
    model = shared["model"] | own.pop("model", {})
    values = shared | {"steps": steps, "model": model} | own
    if "after" in own:  # so that its results are stale once its parent changes
        values["parent"] = recipe_values(own["after"], data)
    return values


def result_path(variant: str, data: str, seed: int) -> Path:
    return RESULTS / f"{variant}-{data}-{seed}.json"


def read_json(path: Path) -> dict:
    """The content of a file, or {} if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def results_of(variant: str, data: str) -> dict[int, dict]:
    """Seed -> result with the current recipe; results with an earlier recipe do not count."""
    recipe = recipe_values(variant, data)
    results = {seed: read_json(result_path(variant, data, seed)) for seed in SEEDS}
    return {seed: result for seed, result in results.items() if result.get("recipe") == recipe}


def document() -> str:
    sections = [HEAD.strip(), *(section(read_table(name)) for name in ORDER)]
    return "\n\n".join(filter(None, sections)) + "\n"


def write_document() -> None:
    write_text(DOCUMENT, document())
    # The loss curves of the table "growing", each variant's first seed.
    with svg_plot(DOCUMENT.with_name("growing.svg"), (7, 3.5)) as axes:
        for row in read_table("growing").rows:
            if results := results_of(row.variant, "compositions"):
                losses = results[min(results)]["losses"]["validation_loss"]
                axes.plot(*zip(*losses, strict=True), marker=".", label=row.label)
        axes.set(xlabel="step of 16 pictures", ylabel="nats per code, held-out compositions")


HEAD = """
# Experiments

The paper's claims, and two steps beyond it, on data that anyone can get. `python -m
experiments.run TABLE -o WORK` measures every number here, and these tables are generated from
`experiments/results`. `experiments/variants.toml` has the models. They are small, so that all of it
runs on a CPU; what holds for them need not hold for large ones.

There are two data sets of 80 subjects in two styles.
- **Compositions**: 8,000 pictures of one to four subjects. Training sees each about once. "loss" is
  nats per code on held-out combinations, conditioned on all earlier codes. The scores are from
  before captions took many forms and counts went to five: new ones only compare with each other.
- **Singles**: 160 pictures that the model memorises. "retrieval" is the share of pictures sampled
  from their prompts whose nearest reference, among the style's 80 subjects, is the prompted one.
  "held-out" is the same for 16 subject-style pairs that are not in the training data. "fit" is
  nats per code on the training pictures, "PSNR" in dB compares a sampled picture with its original.

Tables show only models that have scores. Brackets hold 95 % intervals: over the seeds (Student's t)
where there are several, over the pictures (Wilson) where a retrieval has one seed. A difference, in
nats per code or in percentage points, is paired by seed with the row that the table's text names.
Pictures are sampled without guidance, unless the table says otherwise. Times are for one picture,
without decoding it to pixels, and for one training step of 16 pictures.
"""


def section(table: Table) -> str:
    """A table with its heading, as Markdown, or "" if fewer than two of its rows have scores: one
    alone compares nothing. Rows without scores and empty columns are left out."""
    measured = {row.label: measured_of(row, table.data) for row in table.rows}
    rows = [row for row in table.rows if any(measured[row.label].values())]
    if len(rows) < 2:
        return ""
    columns = zip(*(cells(row, measured) for row in rows), strict=True)
    shown = [column for column in columns if any(cell for _, cell in column)]
    lines = [[column[0][0] for column in shown], ["---"] * len(shown)]
    lines += [[cell for _, cell in line] for line in zip(*shown, strict=True)]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{table.text}\n\n{markdown}"


def window_of(row: Row) -> int:
    return row.window or recipe_values(row.variant, "singles")["windows"][0]


def measured_of(row: Row, data: tuple[str, ...]) -> dict[str, dict[int, float | list[int]]]:
    """Score -> seed -> value; the values of retrieval are [hits, n]."""
    composed, single = (
        results_of(row.variant, name) if name in data else {}
        for name in ("compositions", "singles")
    )
    several = len(recipe_values(row.variant, "singles")["windows"]) > 1
    suffix = f"_window_{window_of(row)}" if several else ""
    settings = {"window": row.window, "generation": row.generation}
    scores = {
        seed: score
        for seed, result in single.items()
        for score in result.get("scores", [])  # an interrupted run has none
        if {key: score[key] for key in settings} == settings
    }
    return {
        "loss": {s: r["losses"][f"validation_loss{suffix}"][-1][1] for s, r in composed.items()},
        "fit": {s: r["losses"][f"trained_loss{suffix}"][-1][1] for s, r in single.items()},
        **{name: {s: score[name] for s, score in scores.items()} for name in SAMPLED},
    }


def cells(row: Row, measured: dict[str, dict]) -> list[tuple[str, str]]:
    """(column, cell) from left to right; `measured` has the scores of each row's label."""
    own = measured[row.label]
    against = measured[row.against] if row.against else {score: {} for score in own}
    percent, percent_against = (
        {seed: 100 * hits / n for seed, (hits, n) in scores["train"].items()}
        for scores in (own, against)
    )
    timed = read_json(TIMES).get(f"{row.variant} at {window_of(row)}")
    if timed is None or row.generation:  # other guidance takes other times
        times = ("", "", "")
    else:
        milliseconds = (f"{1000 * timed[name]:.0f}" for name in ("picture", "step"))
        times = (*milliseconds, f"{16 * timed['flops'] / 1e9:.0f} G")
    return [
        ("model", row.label),
        ("seeds", " / ".join(str(len(own[name])) for name in ("loss", "fit") if own[name])),
        ("loss", _mean(own["loss"].values())),
        ("difference", _difference(own["loss"], against["loss"])),
        ("fit", _mean(own["fit"].values())),
        ("retrieval", _shares(own["train"])),
        ("difference", _difference(percent, percent_against, digits=1)),
        ("retrieval, held-out", _shares(own["held-out"])),
        ("PSNR", _mean(own["psnr"].values(), 2)),
        *zip(("ms / picture", "ms / step", "FLOPs of a step"), times, strict=True),
    ]


def _difference(of: dict[int, float], against: dict[int, float], digits: int = 3) -> str:
    """The mean over the seeds that both have."""
    return _mean([of[seed] - against[seed] for seed in of if seed in against], digits, "+")


def _mean(values: Collection[float], digits: int = 3, sign: str = "") -> str:
    if not values:
        return ""
    e, form = mean(list(values)), f"{sign}.{digits}f"
    interval = "" if math.isnan(e.low) else f" [{e.low:{form}}, {e.high:{form}}]"
    return f"{e.value:{form}}{interval}"


def _shares(counts: dict[int, list[int]]) -> str:
    """[hits, n] of each seed -> a percentage."""
    if not counts:
        return ""
    pairs = list(counts.values())
    e = proportion(*pairs[0]) if len(pairs) == 1 else mean([hits / n for hits, n in pairs])
    low, high = max(0.0, e.low), min(1.0, e.high)
    return f"{100 * e.value:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    write_document()
