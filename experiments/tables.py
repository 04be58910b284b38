"""The tables of docs/experiments.md, made from what lies in experiments/results.

python -m experiments.tables
"""

import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenshuffle_core.evaluation.intervals import mean, share
from tokenshuffle_core.files import atomic_path
from tokenshuffle_core.training.stages import parse_toml

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
TIMES = RESULTS / "times.json"
DOCUMENT = ROOT.parent / "docs" / "experiments.md"
SEEDS = range(10)
OWN = ("rank", "after", "parent")  # keys of a variant that are none of a recipe
ORDER = ("windows", "compression", "fuse_blocks", "guidance", "elastic", "window_head", "growing")


@dataclass(frozen=True)
class Row:
    """A line of a table: a variant, sampled at one of its windows with some settings."""

    label: str
    variant: str
    window: int | None = None
    generation: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """`data` are the data sets that its models are trained on, each on its own."""

    title: str
    text: str
    data: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(name: str) -> Table:
    about = parse_toml(ROOT / f"{name}.toml")
    rows = tuple(Row(**row) for row in about["row"])
    return Table(about["title"], about["text"].strip(), tuple(about["data"]), rows)


@cache
def _variants() -> dict:
    return parse_toml(ROOT / "variants.toml")


def variant_names() -> list[str]:
    return list(_variants()["variants"])


def recipe_values(variant: str, data: str) -> dict:
    """What the variant is trained with on `data`: the values of a recipe, and those of OWN."""
    about = _variants()
    shared, own = about["shared"], dict(about["variants"][variant])
    steps = round(own.pop("times", 1) * about["data"][data]["steps"])
    model = shared["model"] | own.pop("model", {})
    values = shared | {"steps": steps, "model": model} | own
    if "after" in own:  # so that what comes of it is stale once its parent changes
        values["parent"] = recipe_values(own["after"], data)
    return values


def result_path(variant: str, data: str, seed: int) -> Path:
    return RESULTS / f"{variant}-{data}-{seed}.json"


def results_of(variant: str, data: str) -> list[dict]:
    """One for each seed, of the recipe as it stands; those of another one do not count."""
    paths = [result_path(variant, data, seed) for seed in SEEDS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    recipe = recipe_values(variant, data)
    return [result for result in found if result["recipe"] == recipe]


def document() -> str:
    sections = [HEAD.strip(), *(section(read_table(name)) for name in ORDER)]
    return "\n\n".join(sections) + "\n"


def write_document() -> None:
    with atomic_path(DOCUMENT) as temporary:
        temporary.write_text(document(), encoding="utf-8")
    with atomic_path(DOCUMENT.with_name("growing.svg")) as temporary:
        plot_growing(temporary)


def plot_growing(path: Path) -> None:
    """The loss curves of the table "growing", each variant's first seed, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growing"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for row in read_table("growing").rows:
        for result in results_of(row.variant, "compositions")[:1]:
            steps, losses = zip(*result["losses"]["validation_loss"], strict=True)
            axes.plot(steps, losses, marker=".", label=row.label)
    axes.set(xlabel="step of 16 pictures", ylabel="nats per code, held-out compositions")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


HEAD = """
# Experiments

The paper's claims, and two steps beyond it, on data that anyone can get. Every number here is
measured by `python -m experiments.run TABLE -o WORK`, and these tables are generated from
`experiments/results`. `experiments/variants.toml` has the models: small ones, so that all of it
runs on a CPU; what holds for them need not hold for large ones.

There are two data sets of 80 subjects in two styles. **Compositions**: 8,000 pictures of one to
four subjects, each seen about once; "loss" is nats per code on held-out combinations, given all
codes before. **Singles**: 160 pictures that the model learns by heart; "retrieval" is the share of
pictures sampled from their prompts whose nearest reference among the style's 80 subjects is the
prompted one ("held-out": of 16 subject-style pairs that were not trained on), "fit" is nats per
code on the pictures themselves, "PSNR" in dB compares the sampled picture with the one learnt.

What is blank is not measured yet. Brackets hold 95 % intervals: over the seeds (Student's t) where
there are several, over the pictures (Wilson) where a retrieval has one seed. Pictures are sampled
without guidance, unless the table says otherwise. Times are of one picture, without its decoding to
pixels, and of one training step of 16 pictures.
"""

COLUMNS = (
    "model", "seeds", "loss", "fit", "retrieval", "retrieval, held-out", "PSNR", "ms / picture",
    "ms / step", "FLOPs of a step",
)  # fmt: skip


def section(table: Table) -> str:
    """A table with its heading, as Markdown; columns that no row fills are left out."""
    rows = [cells(row) for row in table.rows]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    lines = [[COLUMNS[i] for i in used], ["---"] * len(used)]
    lines += [[row[i] for i in used] for row in rows]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{table.text}\n\n{markdown}"


def cells(row: Row) -> list[str]:
    composed, single = (results_of(row.variant, data) for data in ("compositions", "singles"))
    windows = recipe_values(row.variant, "singles")["windows"]
    window = row.window or windows[0]
    suffix = f"_window_{window}" if len(windows) > 1 else ""
    loss = [result["losses"][f"validation_loss{suffix}"][-1][1] for result in composed]
    fit = [result["losses"][f"trained_loss{suffix}"][-1][1] for result in single]
    asked = {"window": row.window, "generation": row.generation}
    scores = [
        score
        for result in single
        for score in result["scores"]
        if {key: score[key] for key in asked} == asked
    ]
    seeds = " / ".join(str(len(of)) for of in (composed, single) if of)
    found = [row.label, seeds, _mean(loss), _mean(fit)]
    found += [_shares([score[split] for score in scores]) for split in ("train", "held-out")]
    found.append(_mean([score["psnr"] for score in scores], 2))
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    own = times.get(f"{row.variant} at {window}")
    if own is None:
        return [*found, "", "", ""]
    milliseconds = [f"{1000 * own[name]:.0f}" for name in ("picture", "step")]
    return [*found, *milliseconds, f"{16 * own['flops'] / 1e9:.0f} G"]


def _mean(values: list[float], digits: int = 3) -> str:
    if not values:
        return ""
    e, n = mean(values), digits
    return f"{e.value:.{n}f}" + ("" if math.isnan(e.low) else f" [{e.low:.{n}f}, {e.high:.{n}f}]")


def _shares(counts: list[list[int]]) -> str:
    """[hits, n] of each seed -> a percentage."""
    if not counts:
        return ""
    e = share(*counts[0]) if len(counts) == 1 else mean([hits / n for hits, n in counts])
    low, high = max(0.0, e.low), min(1.0, e.high)
    return f"{100 * e.value:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    write_document()
