"""docs/performance.md and its plot, written from benchmarks/results.

    python -m benchmarks.report

A file there is what `benchmarks.decode`, `parts`, `quality` or `janus` wrote with `--json`, or the
rows of several such runs with the same settings; its name starts with the script's.
`resolutions-*.json`, by `benchmarks.decode` as well, is the plot.
"""

import json
from pathlib import Path

from tokenshuffle_core.files import atomic_path

from . import decode, janus, parts, quality

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
DOCUMENT = ROOT.parent / "docs" / "performance.md"
PLOT = DOCUMENT.with_name("resolutions.svg")


def read(name: str) -> dict:
    """What one run found; its rows as those of the module that measured them."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    script = {"parts": parts, "quality": quality}.get(name.split("-")[0], decode)
    found["rows"] = [script.Row(**row) for row in found["rows"]]
    return found


def names(start: str) -> list[str]:
    return sorted(path.stem for path in RESULTS.glob(f"{start}*.json"))


def document() -> str:
    sections = [HEAD.strip()]
    for name in names("decode"):
        found = read(name)
        weights = f", {found['weights']} weights" if found["weights"] else ""
        if (stored := found.get("stored", "float32")) != "float32":
            weights += f", from a file in {stored}"
        sections.append(f"### {_device(found)}{weights}")
        sections.append("\n".join([decode.HEADER, *map(decode.line, found["rows"])]))
    sections.append(RESOLUTIONS.strip())
    for name in names("quality"):
        sections.append(QUALITY.strip())
        sections.append("\n".join([quality.HEADER, *map(quality.line, read(name)["rows"])]))
    for name in names("janus"):
        sections.append(JANUS.strip())
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        sections.append(janus.table(found))
    sections.append(PARTS.strip())
    for name in names("parts"):
        found = read(name)
        sections.append(f"### {_device(found)}")
        sections.append("\n".join([parts.HEADER, *map(parts.line, found["rows"])]))
    return "\n\n".join(sections) + "\n"


def _device(found: dict) -> str:
    threads = "" if found["cuda"] else f", {found['threads']} threads"
    return f"{found['device']}{threads}, torch {found['torch']}"


def plot(path: Path) -> None:
    """Seconds a picture against its side, for each window, with the floor under each curve."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "resolutions"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    ticks: set[int] = set()
    for name in names("resolutions"):
        rows = read(name)["rows"]
        for window in sorted({row.window for row in rows}):
            of = sorted((row for row in rows if row.window == window), key=lambda row: row.size)
            sizes = [row.size for row in of]
            ticks.update(sizes)
            label = f"window {window}, {of[0].parameters / 1e6:.0f} M parameters"
            (curve,) = axes.plot(sizes, [row.picture for row in of], marker="o", label=label)
            floor = [row.floor * row.steps for row in of]
            axes.plot(sizes, floor, linestyle=":", color=curve.get_color())
    axes.plot([], [], linestyle=":", color="grey", label="floor: reading weights and cache")
    axes.set(xscale="log", yscale="log", xlabel="pixels a side", ylabel="seconds a picture")
    axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


HEAD = """
# Performance

An autoregressive step must read each weight and the KV cache once. That time is the floor, and
Token-Shuffle divides the number of steps by s^2. `python -m benchmarks.decode` and `python -m
benchmarks.parts` measured the figures, `python -m benchmarks.report` wrote this page. Other users
of a machine make its figures noisy: compare the columns of a row, which were measured in turn, not
rows.

## Decoding

Random weights, guidance on (two rows a picture), 16 pixels to a code. "MB / step" counts the
weights and the half-filled cache. The floor is these bytes over the bandwidth measured in the same
round. How many times faster a step is: "x plain" than in the same loop without its engine and with
torch's own linear layers; "x transformers" than in that library, which generates as many tokens
with a LLaMA of the same size; "x whole" than with the same model before its weights became
smaller.

All of it computes in float32. Weights "from a file in float16" are those that float16 holds
without loss; the same goes for a checkpoint in float16 or bfloat16. An x86 CPU multiplies them
from 16 bits, so a step reads half the bytes, and its floor is half as high. "x whole" of int8
weights is therefore 1.4 to 2.1 against a float32 file, but 1.0 to 1.2 against a float16 file:
there int8 saves half the memory and little time.
"""

RESOLUTIONS = """
## Resolution

Time against resolution, one round each; the dotted lines are the floor. At window 2, 2048 x 2048
takes 4,096 steps.

![Seconds a picture against pixels a side](resolutions.svg)
"""

QUALITY = """
## 8-bit weights

What they cost the bundled model in quality; `python -m benchmarks.quality DATA`. int8 and fp8
weights need half the memory of a 16-bit file. On a CPU with AVX-512 and VNNI, measured in turn
with the same model from a float16 file, int8 is 1.04, 0.98 and 1.16 times as fast at windows 1, 2
and 4 with 111 M parameters, and 1.19 times as fast at window 2 with 343 M. fp8 is for recent GPUs.
"""

JANUS = """
## Janus-Pro-1B

Random weights of its size, from a published folder in bfloat16; `python -m benchmarks.janus`. The
first step packs the weights for the CPU's kernel, once after loading.
"""

PARTS = """
## Around the loop

The baseline: torch's own linear layers for prefill and sampling, the image tokenizer on whole maps
(LlamaGen's VQ-16), reading the file. Memory is the peak of a new process on top of the weights.
"""


def main() -> None:
    with atomic_path(DOCUMENT) as temporary:
        temporary.write_text(document(), encoding="utf-8")
    with atomic_path(PLOT) as temporary:
        plot(temporary)


if __name__ == "__main__":
    main()
