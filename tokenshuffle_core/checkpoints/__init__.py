"""Checkpoint files, our own and those published by other projects, behind one interface.

A family of published models is a module with a function `is_one`, which recognises its files, and a
function `read` that returns a `Checkpoint`. To add one, write the module and list it in MODELS here
and in `config.FAMILIES`.
"""

from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..config import FAMILIES
from ..engine.quantize import quantized_names
from ..files import Planned, write_safetensors
from ..image_tokenizer import ImageTokenizer
from . import emu, image_tokenizers, janus, llama, llamagen, native, simplear, wallaroo
from .checkpoint import (
    SIXTEEN_BITS,
    Checkpoint,
    Weights,
    checked,
    default_dtype,
    fill,
    named,
    named_shapes,
    skeleton,
)
from .native import SIZES, check_size, is_trained_at, save, save_image_tokenizer, trained_sizes
from .source import EVERY_WRAPPER, PICKLES, Source, name_of, whole_of

__all__ = ["BUNDLED", "Checkpoint", "convert", "load_image_tokenizer", "read", "save", "skeleton"]

BUNDLED = Path(__file__).parent.parent / "weights" / "emoji.safetensors"
IMAGE_TOKENIZERS = image_tokenizers.FAMILIES
MODELS = {  # recognised in this order
    "llamagen": llamagen, "janus": janus, "simplear": simplear, "wallaroo": wallaroo,
    "emu3.5": emu, "llama": llama,
}  # fmt: skip


def read(
    path: str | Path,
    family: str | None = None,
    *,
    image_tokenizer: str | Path | None = None,
    side: int | None = None,
    windows: tuple[int, ...] | None = None,
) -> Checkpoint:
    """The checkpoint at `path`: one of our own, or a published file or folder.

    `family`, one of FAMILIES, is detected if None. `image_tokenizer` is the image tokenizer's file
    if it is separate, `side` the size in pixels of the pictures that the model was trained on,
    `windows` those of a new model that starts from a LLaMA. Raises FileNotFoundError, or ValueError
    with one sentence.
    """
    with named(path):
        family = family or _family_of(path)
        if family is None:
            return native.read(path)
        source = Source(path)
        image_tokenizer = image_tokenizer and Path(image_tokenizer)
        if family not in MODELS:
            raise ValueError(f"a model's family is one of {', '.join(MODELS)}, not {family}")
        if family == "llama":
            return llama.read(source, image_tokenizer, side, windows or (2,))
        if windows:
            raise ValueError(
                "windows can only be set for a LLaMA; grow changes those of other models"
            )
        return MODELS[family].read(source, image_tokenizer, side)


def load_image_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", family: str | None = None
) -> ImageTokenizer:
    """The image tokenizer of a checkpoint, or one in its own file, in float32. `family` and errors
    are those of `read`."""
    with named(path):
        family = family or _family_of(path)
        if family and family not in IMAGE_TOKENIZERS:
            return read(path, family).load_image_tokenizer(device)
        reader = IMAGE_TOKENIZERS[family].read if family else native.read_image_tokenizer
        config, weights = reader(path)
        return fill(skeleton(config), weights, f"{path}: image_tokenizer.", device, torch.float32)


def convert(
    source: str | Path,
    output: str | Path,
    family: str | None = None,
    *,
    image_tokenizer: str | Path | None = None,
    side: int | None = None,
    windows: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
) -> None:
    """Write the checkpoint at `source` in our own format, with one tensor in memory at a time.

    An image tokenizer without a model stays without one. `dtype` is the model's, by default that of
    its text embedding; a checkpoint of our own keeps those that it has. `weights` is a kind to
    quantise the model to. Other arguments and errors are those of `read`; raises OSError if
    `output` cannot be written.
    """
    family = family or _family_of(source)
    if family in IMAGE_TOKENIZERS:
        if weights:
            raise ValueError(f"{source} is an image tokenizer: its weights cannot be {weights}")
        card = {"modelspec.title": name_of(source)}
        return save_image_tokenizer(output, load_image_tokenizer(source, family=family), card)
    checkpoint = read(source, family, image_tokenizer=image_tokenizer, side=side, windows=windows)
    with named(source):
        as_stored = family is None and dtype is None
        embedding = checkpoint.model_weights.get("text_embedding.weight")
        if dtype or (embedding and not as_stored):
            dtype = float_dtype(dtype or embedding().dtype)
        if weights:
            checkpoint = checkpoint.quantized(weights, dtype)
        planned = _planned("model.", checkpoint.skeleton(), checkpoint.model_weights, dtype)
        planned |= _planned(
            "image_tokenizer.",
            skeleton(checkpoint.config.image_tokenizer),
            checkpoint.image_tokenizer_weights,
            None if as_stored else torch.float32,
        )
    nbytes = sum(prod(each.shape) * each.dtype.itemsize for each in planned.values())
    with (
        named(source),
        tqdm(total=nbytes, desc="converting", unit="B", unit_scale=True, disable=None) as bar,
    ):
        metadata = native.metadata_of(
            checkpoint.config, checkpoint.text_tokenizer, checkpoint.card, checkpoint.vocabulary,
            checkpoint.kind,
        )  # fmt: skip
        write_safetensors(output, planned, metadata, bar.update)


def _planned(
    prefix: str, module: nn.Module, weights: Weights, dtype: torch.dtype | None
) -> dict[str, Planned]:
    """Tensors of a file, in the dtypes in which they are stored if `dtype` is None."""
    kept, planned = quantized_names(module), {}
    for name, shape in named_shapes(module, weights, prefix).items():
        compute = partial(checked, weights[name], f"{prefix}{name}", shape, kept.get(name))
        to = kept.get(name) or dtype or float_dtype(weights[name]().dtype)
        planned[f"{prefix}{name}"] = Planned(tuple(shape), to, compute)
    return planned


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that weights of this one are stored in: 16-bit ones stay as they are."""
    return dtype if dtype in SIXTEEN_BITS else torch.float32


def _family_of(path: str | Path) -> str | None:
    """Which of FAMILIES it is, by tensor names that only this family has; None for any other
    safetensors file, such as our own. Raises FileNotFoundError or ValueError."""
    source = Source(path, EVERY_WRAPPER)
    for family, module in MODELS.items():
        if module.is_one(source):
            if family in ("janus", "llama") and not source.path.is_dir():
                raise ValueError(f"{path} is one file of a model that is a folder{whole_of(path)}")
            return family
    if family := image_tokenizers.family_of(source):
        return family
    if source.path.is_dir() or source.path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is not of a supported family ({', '.join(FAMILIES)}), with weights such as "
            f"{', '.join(sorted(source.shapes)[:3])}{whole_of(path)}"
        )
    return None
