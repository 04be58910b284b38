"""What stands around the decode loop: prefill, sampling of codes, image tokenizer, loading.

    python -m benchmarks.parts --json parts.json

Times are medians of rounds. The baseline, measured in turn in the same process: torch's own linear
layers, the image tokenizer on whole feature maps, reading the file. "x" is how many times faster
than it. Memory is the most that a process of its own takes on top of the weights.
"""

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tokenshuffle_core import checkpoints
from tokenshuffle_core.config import LLAMAGEN_VQ16, GenerationConfig
from tokenshuffle_core.engine import prepare
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.sampler import draw_noise, sample_windows

from .decode import about, numbers, synchronize
from .models import random_pipeline

BUFFER = 2**24  # bytes of a file that are read at once


@dataclass
class Row:
    """One line of the table: seconds, and MiB."""

    part: str
    seconds: float
    baseline: float | None = None
    memory: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="111m")
    parser.add_argument("--file-model", default="775m", help="of the checkpoint to load")
    parser.add_argument("--sizes", default="256,512,1024", help="pixels a side")
    parser.add_argument("--large", default="2048", help="sizes without a baseline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=("decode", "encode"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.alone:
        print(json.dumps(alone(options)))
        return
    print(HEADER)
    rows = []
    with torch.inference_mode():
        for part in (prefill, sampling, image_tokenizer, loading):
            for row in part(options):
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        values = about(options.device) | {"rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(values, indent=1) + "\n")


def turns(options, *functions: Callable[[], object], rounds: int | None = None) -> list[float]:
    """Median seconds of each function; a round runs all of them, the first one does not count."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range((rounds or options.rounds) + 1):
        for function, found in zip(functions, seconds, strict=True):
            synchronize(torch.device(options.device))
            started = time.perf_counter()
            function()
            synchronize(torch.device(options.device))
            found.append(time.perf_counter() - started)
    return [statistics.median(found[1:]) for found in seconds]


def against_plain(options, model, function: Callable, rounds: int | None = None) -> list[float]:
    """Median seconds of a function of the model with the engine's layers and with torch's."""
    plain = copy.deepcopy(model)
    prepare(model, torch.device(options.device))
    return turns(options, lambda: function(model), lambda: function(plain), rounds=rounds)


def prefill(options):
    for batch, length in ((1, 8), (1, 128), (4, 128)):
        text = torch.ones(2 * batch, length, dtype=torch.int64, device=options.device)
        padding = torch.zeros(2 * batch, dtype=torch.int64, device=options.device)
        times = against_plain(
            options,
            random_model(options, 2),
            lambda model: model.prefill(text, padding, 64),  # noqa: B023
        )
        yield Row(f"prefill, 2 x {batch} prompts of {length} tokens", *times)


def sampling(options):
    for window in (1, 2, 4):
        model = random_model(options, window)
        generator = torch.Generator(options.device).manual_seed(0)
        scale = torch.tensor([4.0], device=options.device)
        states = torch.randn(2, 1, window**2, model.config.dim, device=options.device)
        states = states.to(model.code_embedding.weight.dtype)

        def step(model):
            noise = draw_noise((window**2, model.config.codebook_size), [generator])[:, None]  # noqa: B023
            sample_windows(model, window, GenerationConfig(), states, noise, scale)  # noqa: B023

        times = against_plain(options, model, step, rounds=10 * options.rounds)
        yield Row(f"head, guidance and choice of the {window**2} codes of a step", *times)


def image_tokenizer(options):
    """LlamaGen's VQ-16 with random weights."""
    images = vq16(options.device)
    for size in numbers(options.sizes):
        codes, picture = inputs(size, options.device)
        found = turns(
            options,
            lambda: images.decode(codes),  # noqa: B023
            lambda: images.pixels(images.quantizer.vectors(codes)),  # noqa: B023
            lambda: images.encode(picture),  # noqa: B023
            lambda: images.quantizer.nearest(images.latent(picture)),  # noqa: B023
        )
        yield Row(f"VQ decode, {size} px", *found[:2], in_a_process(options, "decode", size)[1])
        yield Row(f"VQ encode, {size} px", *found[2:], in_a_process(options, "encode", size)[1])
    for size in numbers(options.large):
        for part in ("decode", "encode"):
            seconds, memory = in_a_process(options, part, size)
            yield Row(f"VQ {part}, {size} px", seconds, memory=memory)


def loading(options):
    """A bfloat16 checkpoint, neither of the two in the system's cache, with each page touched."""
    pipeline = random_pipeline(options.file_model, 2, GenerationConfig())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pipeline.save(path, torch.bfloat16)
        del pipeline

        def load() -> None:
            forget(path)
            model = load(path, options.device, torch.bfloat16).model
            for weight in model.parameters():
                weight.view(-1)[:: 4096 // weight.itemsize].sum()

        def read() -> None:
            forget(path)
            buffer = bytearray(BUFFER)
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        times = turns(options, load, read)
        name = f"{options.file_model}, {path.stat().st_size / 2**30:.1f} GiB"
        yield Row(f"loading a checkpoint, {name}", *times)


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def random_model(options, window: int):
    dtype = checkpoints.default_dtype(options.device)
    settings = GenerationConfig()
    return random_pipeline(options.model, window, settings, options.device, dtype).model


def vq16(device: str) -> ImageTokenizer:
    with torch.device(device):
        return ImageTokenizer(LLAMAGEN_VQ16).eval()


def inputs(size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    side = size // LLAMAGEN_VQ16.stride
    codes = torch.randint(LLAMAGEN_VQ16.codebook_size, (1, side, side), device=device)
    return codes, torch.rand(1, 3, size, size, device=device)


def in_a_process(options, part: str, size: int) -> tuple[float, float]:
    """Seconds and MiB of one decoding or encoding in a new process."""
    command = [sys.executable, "-m", "benchmarks.parts", "--alone", part, "--large", str(size)]
    output = subprocess.run(
        [*command, "--device", options.device], check=True, stdout=subprocess.PIPE, text=True
    )
    return tuple(json.loads(output.stdout))


def alone(options) -> tuple[float, float]:
    images = vq16(options.device)
    codes, picture = inputs(int(options.large), options.device)
    with torch.inference_mode():
        images.decode(codes[:, :4, :4])  # libraries take what they need
        before = peak(options.device)
        started = time.perf_counter()
        if options.alone == "decode":
            images.decode(codes)
        else:
            images.encode(picture)
        synchronize(torch.device(options.device))
    return time.perf_counter() - started, peak(options.device) - before


def peak(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10


HEADER = "| part | ms | x baseline | memory, MiB |\n| --- | --- | --- | --- |"


def line(row: Row) -> str:
    ratio = f"{row.baseline / row.seconds:.2f}" if row.baseline else ""
    memory = f"{row.memory:.0f}" if row.memory else ""
    return f"| {row.part} | {1000 * row.seconds:.3g} | {ratio} | {memory} |"


if __name__ == "__main__":
    main()
