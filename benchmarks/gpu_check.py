"""Three minutes on a borrowed GPU: does it compute what a CPU computes, how fast, in what memory?

    python -m benchmarks.gpu_check --json check.json

Five parts, one after the other: codes of two models, the time of a step, pictures of three image
tokenizers, what pictures leave in memory, the tests that need CUDA. The file is written again
after each measurement, so that an interrupted run keeps its results. If a part fails, its error
goes into the file and the next part begins; the exit status is then 1. Needs only the core's own
requirements.
"""

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tokenshuffle_core import engine
from tokenshuffle_core.config import Config
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.pipeline import Pipeline, load
from tokenshuffle_core.presets import LLAMAGEN_VQ16

from . import decode
from .measure import machine, seconds_of, write_json
from .models import COSMOS, SIMPLEAR, random_pipeline, random_weights

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a red apple", "a fox, flat style", "three dogs on blue")


PARTS = ("codes", "decoding", "image_tokenizers", "memory", "tests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", help="instead of all five", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="sizes for a trial on a CPU")
    parser.add_argument("--seconds", type=float, default=170, help="after which the tests stop")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    started = time.perf_counter()
    options.deadline = started + options.seconds
    about = machine(options.device) | {"python": platform.python_version()}
    about["cuda"] = torch.version.cuda if about["cuda"] else None
    results: dict = {"about": about}

    def keep() -> None:
        about["seconds"] = round(time.perf_counter() - started, 1)
        write_json(options.json, results)

    failed = False
    functions = codes, decoding, image_tokenizers, memory, gpu_tests
    parts = dict(zip(PARTS, functions, strict=True))
    for name in options.parts or PARTS:
        rows = results[name] = []
        keep()
        try:
            for row in parts[name](options):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
                keep()
        except Exception:
            failed = True
            rows.append({"error": traceback.format_exc(limit=-4)})
            print(name, rows[-1]["error"], file=sys.stderr, flush=True)
    keep()
    sys.exit(failed)


def codes(options):
    """Greedy codes in float32, here and on the CPU: of the bundled model, and of two layers of
    SimpleAR's with random weights."""
    side = 64 if options.small else 128
    for prompt in PROMPTS[:1] if options.small else PROMPTS:
        on_cpu, here = (
            greedy_codes(load(device=device, dtype=torch.float32), prompt, side)
            for device in ("cpu", options.device)
        )
        yield {"model": "bundled", "prompt": prompt} | compared(on_cpu, here)
    dim = 192 if options.small else SIMPLEAR.dim
    shape = replace(SIMPLEAR, text_vocabulary=2048, layers=2, dim=dim)
    tiny = replace(COSMOS, channels=8)  # no pictures are decoded
    torch.manual_seed(0)
    loaded = random_weights(Config(tiny, shape), load().text_tokenizer, "cpu")
    on_cpu = greedy_codes(loaded, PROMPTS[0], 64)
    engine.release(loaded.model)
    loaded.model.to(options.device)
    here = greedy_codes(loaded, PROMPTS[0], 64)
    yield {"model": "SimpleAR", "prompt": PROMPTS[0]} | compared(on_cpu, here)


def compared(on_cpu: torch.Tensor, here: torch.Tensor) -> dict:
    same = (on_cpu == here).flatten()
    return {
        "codes": same.numel(),
        "equal": same.float().mean().item(),
        "all_equal": bool(same.all()),
    }


def greedy_codes(loaded: Pipeline, prompt: str, side: int) -> torch.Tensor:
    size = {"width": side, "height": side, "any_size": True}
    settings = replace(loaded.config.generation, temperature=0.0, **size)
    *_, last = loaded.sample([loaded.encode_prompt(prompt)], [], settings, [0])
    return last.codes.cpu()


@torch.inference_mode()
def image_tokenizers(options):
    """Pictures of random codes, decoded and encoded again. At the smallest size they are compared
    with the CPU's in float32, that is without TF32 on the device."""
    sizes = (32, 64) if options.small else (512, 1024, 2048)
    vq16, cosmos = LLAMAGEN_VQ16, COSMOS
    if options.small:
        vq16, cosmos = replace(vq16, channels=32), replace(cosmos, channels=8)
    torch.manual_seed(0)
    for name, module, measured_at in (
        ("bundled", load(dtype=torch.float32).image_tokenizer, sizes),
        ("VQ-16", ImageTokenizer(vq16).eval(), sizes),
        ("Cosmos", ImageTokenizer(cosmos).eval(), sizes[:2]),
    ):
        on_cpu = decoded_and_encoded(module, sizes[0], "cpu")
        module.to(options.device)
        for size in measured_at:
            row = {"image_tokenizer": name, "pixels": size}
            if size == sizes[0]:
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    picture, again = decoded_and_encoded(module, size, options.device)
                row["largest_difference"] = (picture - on_cpu[0]).abs().max().item()
                row["equal_codes"] = (again == on_cpu[1]).float().mean().item()
            random = random_codes(module, size).to(options.device)
            picture = module.decode(random)  # warms up
            for key, save in (("decode", False), ("decode_saving_memory", True)):
                row[key] = measured(lambda: module.decode(random, save), options)  # noqa: B023
                expected = module.working_nbytes(1, size**2, random.device, save)
                row[key]["expected_mib"] = expected / 2**20
            row["encode"] = measured(lambda: module.encode(picture), options)  # noqa: B023
            yield row
        module.cpu()


def random_codes(module: ImageTokenizer, size: int) -> torch.Tensor:
    side = size // module.config.stride
    generator = torch.Generator().manual_seed(size)
    return torch.randint(module.config.codebook_size, (1, side, side), generator=generator)


def decoded_and_encoded(module: ImageTokenizer, size: int, device: str):
    """A picture of random codes, and the codes of a picture of noise, both on the CPU."""
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    picture = module.decode(random_codes(module, size).to(device))
    return picture.cpu(), module.encode(noise.to(device)).cpu()


def measured(function: Callable[[], object], options) -> dict:
    """Median seconds of three calls, and the peak of their memory in MiB (None on a CPU)."""
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = statistics.median(seconds_of(function, options.device) for _ in range(3))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    return {"seconds": seconds, "peak_mib": peak}


# Model, window, pixels, then what is measured of it in turn: kind of weights, pictures at once,
# windows ahead (None: the engine's choice).
DECODED = (
    ("2.7b", 2, 2048, [(None, 1, 1)]),
    ("simplear-1.5b", 1, 1024, [(None, 1, 1)]),
    ("111m", 1, 256, [(None, 1, 1), (None, 1, None), (None, 8, 1)]),
    ("111m", 2, 256, [(None, 1, 1), (None, 1, None), (None, 8, 1)]),
    ("2.7b", 2, 512, [
        (None, 1, 1), (None, 8, 1), ("int8", 1, 1), ("int4", 1, 1), ("fp8", 1, 1), (None, 1, None),
    ]),
    ("111m", 4, 256, [(None, 1, 1)]),
    ("111m", 2, 512, [("int8", 1, 1), ("int4", 1, 1)]),
)  # fmt: skip
LONG = 1024  # pixels a side from which on a picture is drawn once, after the first steps of another
TINY = (("tiny", 1, 64, [(None, 1, 1), (None, 2, 1)]), ("tiny", 2, 128, [("int4", 1, None)]))


def begin(pipeline: Pipeline, size: int, batch: int, ahead: int | None) -> None:
    """The first steps of pictures of this size: kernels are compiled for it."""
    settings = replace(pipeline.config.generation, width=size, height=size)
    prompts = [pipeline.encode_prompt("a red apple")] * batch
    steps = pipeline.sample(prompts, [], settings, list(range(batch)), ahead=ahead)
    for step in steps:
        if step.position == 4:
            break
    steps.close()


def decoding(options):
    """The time of a step against the time of reading what it must read, guidance on, in the
    device's usual dtype."""
    device = options.device
    for name, window, size, variants in TINY if options.small else DECODED:
        whole = random_pipeline(name, window, device)
        for weights, batch, ahead in variants:
            pipeline = whole
            if weights:
                pipeline = replace(whole, model=quantize(copy.deepcopy(whole.model), weights))
            steps, read = decode.bytes_of_a_step(pipeline.model, size, batch)
            if size < LONG:
                decode.picture(pipeline, size, batch, ahead, True)  # compiles and captures
            else:
                begin(pipeline, size, batch, ahead)
            seconds = decode.picture(pipeline, size, batch, ahead, True)
            again = decode.picture(pipeline, size, batch, ahead, True) if size < LONG else seconds
            floor = read / decode.bandwidth(read, device)
            yield {
                "model": name, "window": window, "size": size, "weights": weights, "batch": batch,
                "ahead": ahead, "steps": steps, "picture": min(seconds, again),
                "step": min(seconds, again) / steps, "bytes": read, "floor": floor,
            }  # fmt: skip
            engine.release(pipeline.model)
            del pipeline
        del whole
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


HEADER = """\
| model | window | pixels | weights | pictures at once | windows ahead | steps | ms / step \
| floor, ms | share of the floor | seconds a picture |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: dict) -> str:
    cells = [
        row["model"], row["window"], row["size"], row["weights"] or "bfloat16", row["batch"],
        row["ahead"] or "chosen", row["steps"], f"{1e3 * row['step']:.2f}",
        f"{1e3 * row['floor']:.3f}", f"{row['floor'] / row['step']:.0%}",
        f"{row['picture'] / row['batch']:.3g}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def memory(options):
    """What fifty pictures leave in memory, in MiB; None on a CPU."""
    cuda = options.device.startswith("cuda")
    loaded = load(device=options.device)
    settings = loaded.config.generation
    ids, used = loaded.encode_prompt(PROMPTS[0]), []
    for seed in range(4 if options.small else 50):
        list(loaded.sample([ids], [], settings, [seed]))
        used.append(torch.cuda.memory_allocated() / 2**20 if cuda else None)
    yield {"pictures": len(used), "after_three": used[2], "after_all": used[-1]}
    engine.release(loaded.model)
    yield {"released": torch.cuda.memory_allocated() / 2**20 if cuda else None}


def gpu_tests(options):
    """The tests that need CUDA."""
    if not importlib.util.find_spec("pytest"):
        yield {"summary": "not run: pytest is not installed"}
        return
    left = max(1.0, options.deadline - time.perf_counter())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=--import-mode=importlib",
        "-m",
        "gpu",
        "tests",
    ]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        yield {"summary": f"stopped after {left:.0f} s"}
        return
    output = run.stdout.strip()
    yield {"returncode": run.returncode, "summary": output.splitlines()[-1] if output else ""}
    if run.returncode:
        raise RuntimeError(output[-2000:] + run.stderr[-2000:])


if __name__ == "__main__":
    main()
