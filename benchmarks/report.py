"""docs/performance.md and its plot, written from benchmarks/results.

    python -m benchmarks.report

A file there is what `benchmarks.decode`, `busy`, `gpu_check`, `parts`, `quality`, `janus` or
`simplear` wrote with `--json`, or the rows of several such runs with the same settings; its name
starts with the script's, gpu-*.json for `gpu_check`. `resolutions-*.json`, by `benchmarks.decode`
as well, is the plot.
"""

import json
from pathlib import Path

from tokenshuffle_core.files import write_text

from . import busy, decode, gpu_check, janus, parts, quality, simplear
from .measure import svg_plot

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
DOCUMENT = ROOT.parent / "docs" / "performance.md"
PLOT = DOCUMENT.with_name("resolutions.svg")


def results(script: str) -> list[dict]:
    """The results of a script, in the order of their files' names."""
    paths = sorted(RESULTS.glob(f"{script}*.json"), key=lambda path: path.stem)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def document() -> str:
    sections = [HEAD.strip()]
    for result in results("decode"):
        weights = f", {result['weights']} weights" if result["weights"] else ""
        if (stored := result.get("stored", "float32")) != "float32":
            weights += f", from a file in {stored}"
        sections += [f"### {_device(result)}{weights}", _table(decode, result)]
    for result in results("busy"):
        sections += [BUSY.strip(), f"### {_device(result)}", _table(busy, result)]
    sections.append(GPU.strip())
    for result in results("gpu"):
        about = result["about"]
        sections.append(f"### {about['device']}, torch {about['torch']}{about.get('note', '')}")
        sections.append("\n".join([gpu_check.HEADER, *map(gpu_check.line, result["decoding"])]))
    sections.append(RESOLUTIONS.strip())
    for result in results("quality"):
        sections += [QUALITY.strip(), _table(quality, result)]
    for result in results("janus"):
        sections += [JANUS.strip(), janus.table(result)]
    for result in results("simplear"):
        sections += [SIMPLEAR.strip(), simplear.table(result)]
    sections.append(PARTS.strip())
    for result in results("parts"):
        sections += [f"### {_device(result)}", _table(parts, result)]
    return "\n\n".join(sections) + "\n"


def _table(script, result: dict) -> str:
    return "\n".join([script.HEADER, *map(script.line, result["rows"])])


def _device(result: dict) -> str:
    threads = "" if result["cuda"] else f", {result['threads']} threads"
    return f"{result['device']}{threads}, torch {result['torch']}"


def plot() -> None:
    """Seconds a picture against its side, for each window, with the floor under each curve."""
    ticks: set[int] = set()
    with svg_plot(PLOT, (7, 4)) as axes:
        for result in results("resolutions"):
            for window in sorted({row["window"] for row in result["rows"]}):
                rows = [row for row in result["rows"] if row["window"] == window]
                rows.sort(key=lambda row: row["size"])
                sizes = [row["size"] for row in rows]
                ticks.update(sizes)
                label = f"window {window}, {rows[0]['parameters'] / 1e6:.0f} M parameters"
                (curve,) = axes.plot(
                    sizes, [row["picture"] for row in rows], marker="o", label=label
                )
                floor = [row["floor"] * row["steps"] for row in rows]
                axes.plot(sizes, floor, linestyle=":", color=curve.get_color())
        axes.plot([], [], linestyle=":", color="grey", label="floor: reading weights and cache")
        axes.set(xscale="log", yscale="log", xlabel="pixels a side", ylabel="seconds a picture")
        axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)


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

BUSY = """
## Beside other programs

A picture of 128 px, sampled and decoded, beside programs that each keep one core busy; `python -m
benchmarks.busy`. The fair share beside k of them is a (k + 1)th of the machine, "x fair" the time
over k + 1 times that on an idle machine. Small work runs on one thread where that is faster: all
threads wait for each other after each of many small operations.
"""

GPU = """
## On a GPU

`benchmarks/gpu.sh check` measures steps there: random weights, guidance on, windows that a step
samples as given or as the engine chose. A "step" is a picture's time over the steps of one window
each. The floor is the bytes that a step must read over the bandwidth of a copy.

Steps as one CUDA graph each and Triton's kernels are newer than these figures: so far, no GPU has
run them.
"""

RESOLUTIONS = """
## Resolution

Time against resolution, one round each; the dotted lines are the floor. At window 2, 2048 x 2048
takes 4,096 steps.

![Seconds a picture against pixels a side](resolutions.svg)
"""

QUALITY = """
## Quantised weights

What they cost the bundled model in quality; `python -m benchmarks.quality DATA`, with 4,000
compositions. int4 loses 0.055 nats a code, ten times as much as int8. int8 and fp8 weights need
half the memory of a 16-bit file, int4 weights a quarter. On a CPU with AVX-512 and VNNI, measured
in turn with the same model from a float16 file, int8 is 1.04, 0.98 and 1.16 times as fast at
windows 1, 2 and 4 with 111 M parameters, and 1.19 times as fast at window 2 with 343 M. fp8 is for
recent GPUs.

Products with int4 weights do not round activations. A CPU expands the weights before decoding, an
x86 one to 16 bits, which loses nothing: a step is then one with weights from a float16 file, and
takes 2.5 bytes a weight. PyTorch's own weight-only kernels for int8 and int4 are no help: on two
cores with AVX-512, with two rows of float32 and matrices of 768 to 4,096 rows and columns, they
take 6 to 14 and 13 to 29 times as long as the one that rounds activations to int8.

By counting, a model of Emu3.5's size, 34 billion weights, takes 19.7 GB with int4 weights, of which
the embeddings of text and codes, 2.9 GB, stay in 16 bits; its cache for two rows of 4,300 positions
in bfloat16 takes 2.3 GB. One block of its width, with normal random weights of which one in a
million is 20 times as large: against bfloat16 weights, int4 changes each matrix by 9.8 % and what
the block adds to its input by 24 %, in the norm.

`convert --weights` holds one tensor at a time. A random Qwen3 in four shards of 320 MB in bfloat16,
on one thread: beyond what the process had before, and without pages of files, memory grows by 0.8
times a shard without quantising, 1.05 times with int8, 1.0 with fp8 and 0.9 with int4, and it takes
2.0, 1.3, 2.5 and 3.6 times as long as copying the shards. Of this memory, a part is that of the
layers that are new to a LLaMA. Loading the result in bfloat16 takes 1.0 times its size; in float32,
as a CPU decodes, 1.23 times for int4, since the embeddings grow.
"""

JANUS = """
## Janus-Pro-1B

Random weights of its size, from a published folder in bfloat16; `python -m benchmarks.janus`. The
first step packs the weights for the CPU's kernel, once after loading.
"""

SIMPLEAR = """
## SimpleAR-1.5B

Random weights of its size, in bfloat16 as in the published files, for pictures of 1024 px, which
take 4,096 windows; `python -m benchmarks.simplear`. Steps have two rows, guidance and a draw, and
were measured in turn with those of `transformers`' Qwen2 with the same weights. Ours compute in
float32 from packed 16-bit weights, beside which those of the file stay in memory. Guesses of random
weights are all wrong, so that the engine samples one window a step after it has tried more.
"""

PARTS = """
## Around the loop

The baseline: torch's own linear layers for prefill and sampling, the image tokenizer on whole maps
(LlamaGen's VQ-16), reading the file. Memory is the peak of a new process on top of the weights.
"""


def main() -> None:
    write_text(DOCUMENT, document())
    plot()


if __name__ == "__main__":
    main()
