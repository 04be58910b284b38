"""Options that several commands share, and how they are applied."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from ..config import SCHEDULES, WEIGHT_KINDS, GenerationConfig


def command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_model(parser, lora: bool = True) -> None:
    parser.add_argument(
        "--model", metavar="FILE", help="a checkpoint, or the file or folder of a published "
        "model (default: the bundled model)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    if lora:
        parser.add_argument(
            "--lora",
            action="append",
            default=[],
            metavar="FILE[=STRENGTH]",
            help="merge a LoRA into the model; repeat the option for more",
        )
        parser.add_argument(
            "--weights",
            choices=WEIGHT_KINDS,
            help="convert the weights on loading: int8 and fp8 take half the memory of 16 bits, "
            "int4 a quarter at a cost in quality; on a CPU, int8 decodes 0.98 to 1.19 times as "
            "fast, and int4 is expanded to 16 or 32 bits",
        )


def add_sampling(parser) -> None:
    parser.add_argument("--cfg", type=float, help="guidance scale; 1 is off")
    parser.add_argument(
        "--schedule", choices=SCHEDULES, help="how guidance changes over the picture"
    )
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="keep the K most likely codes; 0 is off")
    parser.add_argument(
        "--top-p", type=float, help="keep the most likely codes up to mass P; 1 is off"
    )
    parser.add_argument(
        "--window", type=int, help="one of the model's: a larger one is faster and coarser"
    )
    parser.add_argument(
        "--any-size", action="store_true", default=None,
        help="also sizes that the model was not trained at, which mostly come out as noise",
    )  # fmt: skip


def settings_of(options, defaults: GenerationConfig) -> GenerationConfig:
    values = {field.name: getattr(options, field.name, None) for field in fields(defaults)}
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})


def device_of(name: str):
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} does not exist on this machine") from None
    return device


def own_device(name: str) -> str:
    """The name of this process's device: under torchrun, each process of a machine has a GPU."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    shared = name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{local}" if shared and local else name


def process() -> tuple[int, int]:
    """This process's rank and the number of processes: torchrun's, or 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def load(options):
    """The pipeline of --model, changed by --lora and --weights."""
    from .. import pipeline
    from ..adapt.lora import merge_lora
    from ..engine.quantize import quantize

    # A LoRA is merged into whole weights.
    weights = None if options.lora else options.weights
    loaded = pipeline.load(model_path(options), device_of(options.device), weights=weights)
    for text in options.lora:
        merge_lora(loaded.model, *file_and_strength(text))
    if options.lora and options.weights:
        quantize(loaded.model, options.weights)
    return loaded


def model_path(options) -> str | Path:
    from ..checkpoints import BUNDLED

    return options.model or BUNDLED


def file_and_strength(text: str) -> tuple[str, float]:
    path, equals, strength = text.rpartition("=")
    if not equals or Path(text).is_file():  # the name of a file may contain "="
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        if "." in strength:  # so this is the end of a name, not a strength
            return text, 1.0
        raise ValueError(f"--lora {text}: {strength!r} is not a number") from None


def identity(options) -> dict:
    """What identifies the weights to score, whatever their files are called."""
    loras = [file_and_strength(text) for text in options.lora]
    return {
        "sha256": _sha256(model_path(options)),
        "lora": [[_sha256(path), strength] for path, strength in loras],
        "weights": options.weights,
    }


def _sha256(path: str | Path) -> str:
    """The checksum of a file, or of the files of a folder."""
    from ..files import sha256

    folder = Path(path)
    files = sorted(part for part in folder.iterdir() if part.is_file()) if folder.is_dir() else []
    return sha256(block for file in files or [folder] for block in _blocks(file))


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(2**20):
            yield block


def run_of(options):
    """The model, and the settings with which this process, possibly of torchrun, draws."""
    from ..bulk import Run

    check_batch(options)
    options.device = own_device(options.device)
    pipeline = load(options)
    settings = settings_of(options, pipeline.config.generation)
    return pipeline, Run(identity(options), settings, options.seed, options.batch, *process())


def check_batch(options) -> None:
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {options.batch}")


def check_output(path: str, *suffixes: str) -> Path:
    """What can be refused of an output before there is anything to write."""
    from ..files import target_of

    output = Path(path)
    if output.is_dir():
        example = output / f"name{suffixes[0]}"
        raise ValueError(f"output {path} is a folder: give a file, such as {example}")
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"output {path} must end in {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output folder {output.parent} does not exist: create it first")
    target_of(output)
    return output
