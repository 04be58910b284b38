"""The tables of docs/experiments.md, made from what lies in experiments/results.

python -m experiments.tables
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from tokenshuffle_core.evaluation.intervals import mean, share
from tokenshuffle_core.files import atomic_path
from tokenshuffle_core.training.stages import parse_toml

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
TIMES = RESULTS / "times.json"
DOCUMENT = ROOT.parent / "docs" / "experiments.md"
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
    title: str
    text: str
    rows: tuple[Row, ...]


def read_table(name: str) -> Table:
    about = parse_toml(ROOT / f"{name}.toml")
    return Table(about["title"], about["text"].strip(), tuple(Row(**row) for row in about["row"]))


def read_variants() -> dict[str, dict]:
    """Name -> the recipe's values, the shared ones included."""
    about = parse_toml(ROOT / "variants.toml")
    shared = about["shared"]
    variants = {}
    for name, own in about["variants"].items():
        model = shared["model"] | own.get("model", {})
        variants[name] = shared | own | {"model": model}
    return variants


def result_path(variant: str, seed: int) -> Path:
    return RESULTS / f"{variant}-seed-{seed}.json"


def results_of(variant: str) -> list[dict]:
    """One for each seed, of the recipe as it stands; those of another one do not count."""
    found = [json.loads(path.read_text("utf-8")) for path in RESULTS.glob(f"{variant}-seed-*.json")]
    recipe = read_variants()[variant]
    return sorted((r for r in found if r["recipe"] == recipe), key=lambda result: result["seed"])


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
        for result in results_of(row.variant)[:1]:
            steps, losses = zip(*result["losses"]["trained_loss"], strict=True)
            axes.plot(steps, losses, marker=".", label=row.label)
    axes.set(xlabel="step of 16 pictures", ylabel="nats per code, training pictures")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


HEAD = """
# Experiments

The paper's claims, and two steps beyond it, on data that anyone can get. Every number here is
measured by `python -m experiments.run TABLE -o WORK`, and these tables are generated from
`experiments/results`. `experiments/variants.toml` has the models: small ones, so that all of it
runs on a CPU; what holds for them need not hold for large ones.

Losses are nats per code, of the training pictures and of held-out ones, given all codes before.
Retrieval is the share of pictures, sampled from prompts of the training set or of held-out
subject-style pairs, whose nearest reference among the style's 80 subjects is the prompted one.
Brackets hold 95 % intervals: over the seeds (Student's t) where there are several, over the
pictures (Wilson) where a retrieval has one seed. Times are of one picture with guidance, without
its decoding to pixels, and of one training step of 16 pictures.
"""

COLUMNS = (
    "model", "seeds", "trained loss", "held-out loss", "retrieval trained", "retrieval held-out",
    "ms / picture", "ms / step", "training PFLOP",
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
    variant = read_variants()[row.variant]
    windows = variant["windows"]
    window = row.window or windows[0]
    results = results_of(row.variant)
    suffix = f"_window_{window}" if len(windows) > 1 else ""
    losses = [
        [result["losses"][f"{name}_loss{suffix}"][-1][1] for result in results]
        for name in ("trained", "validation")
    ]
    asked = {"window": row.window, "generation": row.generation}
    scores = [
        score
        for result in results
        for score in result["scores"]
        if {key: score[key] for key in asked} == asked
    ]
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    own = [times.get(f"{row.variant} at {each}") for each in windows]
    found = [row.label, str(len(results)) if results else ""]
    found += [_mean(values) for values in losses]
    found += [_shares([score[split] for score in scores]) for split in ("train", "held-out")]
    if all(own):
        mix = variant.get("window_mix", [1] * len(windows))
        flops = sum(m * each["flops"] for m, each in zip(mix, own, strict=True)) / sum(mix)
        at = own[windows.index(window)]
        petaflop = flops * variant["steps"] * variant["batch"] / 1e15
        found += [f"{1000 * at['picture']:.0f}", f"{1000 * at['step']:.0f}", f"{petaflop:.3f}"]
    else:
        found += ["", "", ""]
    return found


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    e = mean(values)
    return f"{e.value:.3f}" + ("" if math.isnan(e.low) else f" [{e.low:.3f}, {e.high:.3f}]")


def _shares(counts: list[list[int]]) -> str:
    """[hits, n] of each seed -> a percentage."""
    if not counts:
        return ""
    e = share(*counts[0]) if len(counts) == 1 else mean([hits / n for hits, n in counts])
    low, high = max(0.0, e.low), min(1.0, e.high)
    return f"{100 * e.value:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    write_document()
