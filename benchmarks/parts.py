"""The parts around the decode loop: prefill, sampling of codes, image tokenizer, loading.

    python -m benchmarks.parts --json parts.json

Times are medians of rounds. The baseline is measured in turn in the same process: torch's own
linear layers, the image tokenizer on whole feature maps, reading the file. "x" is the speed
relative to it. Memory is the peak of a separate process on top of the weights.
"""

import argparse
import copy
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine import prepare
from tokenshuffle_core.image_tokenizer import ImageTokenizer
from tokenshuffle_core.noise import draw_gumbel
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.presets import LLAMAGEN_VQ16
from tokenshuffle_core.sampler import sample_windows
from tokenshuffle_core.transformer import KVCache

from .measure import in_a_process, machine, numbers, peak_mib, seconds_of, write_rows
from .models import random_pipeline

BUFFER = 2**24  # bytes of a file to read at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="111m")
    parser.add_argument("--file-model", default="775m", help="of the checkpoint to load")
    parser.add_argument("--sizes", type=numbers, default="256,512,1024", help="pixels a side")
    parser.add_argument("--large", type=numbers, default="2048", help="sizes without a baseline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        write_rows(HEADER, line, rows(options), options.json, **machine(options.device))


def rows(options) -> Iterator[dict]:
    for part in (prefill, sampling, image_tokenizer, loading):
        for name, seconds, baseline, memory in part(options):
            yield {"part": name, "seconds": seconds, "baseline": baseline, "memory": memory}


def turns(options, *functions: Callable[[], object], rounds: int | None = None) -> list[float]:
    """Median seconds of each function. A round runs all of them; the first does not count."""
    seconds = [
        [seconds_of(function, options.device) for function in functions]
        for _ in range((rounds or options.rounds) + 1)
    ]
    return [statistics.median(column) for column in zip(*seconds[1:], strict=True)]


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
            random_pipeline(options.model, 2, options.device).model,
            lambda model: model.prefill(cache_of(model, padding, length), text),  # noqa: B023
        )
        yield f"prefill, 2 x {batch} prompts of {length} tokens", *times, None


def cache_of(model, padding, length: int) -> KVCache:
    return KVCache(model.config, padding, length + 64, model.code_embedding.weight.dtype)


def sampling(options):
    for window in (1, 2, 4):
        model = random_pipeline(options.model, window, options.device).model
        generator = torch.Generator(options.device).manual_seed(0)
        scale = torch.tensor([4.0], device=options.device)
        states = torch.randn(2, 1, window**2, model.config.dim, device=options.device)
        states = states.to(model.code_embedding.weight.dtype)

        def step(model):
            noise = draw_gumbel((window**2, model.config.codebook_size), [generator])[:, None]  # noqa: B023
            sample_windows(model, window, GenerationConfig(), states, noise, scale)  # noqa: B023

        times = against_plain(options, model, step, rounds=10 * options.rounds)
        yield f"head, guidance and choice of the {window**2} codes of a step", *times, None


def image_tokenizer(options):
    for size in [*options.sizes, *options.large]:
        images, codes, picture = vq16(size, options.device)
        whole_maps = {
            "decode": lambda: images.pixels(images.quantizer.vectors(codes)),  # noqa: B023
            "encode": lambda: images.codes_of(images.latent(picture)),  # noqa: B023
        }
        for part, argument in (("decode", codes), ("encode", picture)):
            seconds, memory = in_a_process(alone, part, size, options.device)
            times = [seconds, None]
            if size in options.sizes:
                function = partial(getattr(images, part), argument)
                times = turns(options, function, whole_maps[part])
            yield f"VQ {part}, {size} px", *times, memory


def loading(options):
    """Loading a bfloat16 checkpoint and reading every page of its weights, against reading the
    file; neither from the system's cache."""
    pipeline = random_pipeline(options.file_model, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pipeline.save(path, torch.bfloat16)
        del pipeline

        def load_checkpoint() -> None:
            forget(path)
            model = load(path, options.device, torch.bfloat16).model
            for weight in model.parameters():
                weight.view(-1)[:: 4096 // weight.itemsize].sum()

        def read_file() -> None:
            forget(path)
            buffer = bytearray(BUFFER)
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        times = turns(options, load_checkpoint, read_file)
        size = path.stat().st_size / 2**30
        yield f"loading a checkpoint, {options.file_model}, {size:.1f} GiB", *times, None


def forget(path: Path) -> None:
    """Drop a file from the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def vq16(size: int, device: str) -> tuple[ImageTokenizer, torch.Tensor, torch.Tensor]:
    """LlamaGen's VQ-16 with random weights; codes and a picture of `size` pixels a side."""
    side = size // LLAMAGEN_VQ16.stride
    codes = torch.randint(LLAMAGEN_VQ16.codebook_size, (1, side, side), device=device)
    with torch.device(device):
        return ImageTokenizer(LLAMAGEN_VQ16).eval(), codes, torch.rand(1, 3, size, size)


@torch.inference_mode()
def alone(part: str, size: int, device: str) -> tuple[float, float]:
    """Seconds and MiB to decode or encode once, in a process without other work."""
    images, codes, picture = vq16(size, device)
    images.decode(codes[:, :4, :4])  # libraries take what they need
    before = peak_mib(device)
    function = getattr(images, part)
    argument = codes if part == "decode" else picture
    return seconds_of(lambda: function(argument), device), peak_mib(device) - before


HEADER = "| part | ms | x baseline | memory, MiB |\n| --- | --- | --- | --- |"


def line(row: dict) -> str:
    ratio = f"{row['baseline'] / row['seconds']:.2f}" if row["baseline"] else ""
    memory = f"{row['memory']:.0f}" if row["memory"] else ""
    return f"| {row['part']} | {1000 * row['seconds']:.3g} | {ratio} | {memory} |"


if __name__ == "__main__":
    main()
