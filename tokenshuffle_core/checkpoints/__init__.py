"""Checkpoint files, our own and those published by other projects, behind one interface.

A family of published models is a module with MARKS, tensor names that only its files have, and a
function `read` that returns a `Checkpoint`. To add one, write the module and list it in MODELS here
and in `config.FAMILIES`.
"""

from functools import partial
from pathlib import Path

import torch

from ..config import FAMILIES
from ..files import Planned, write_safetensors
from ..image_tokenizer import ImageTokenizer
from . import image_tokenizers, janus, llama, llamagen, native
from .checkpoint import Checkpoint, checked, fill, named, named_shapes, skeleton
from .native import SIZES, check_size, is_trained_at, save, save_image_tokenizer, trained_sizes
from .source import PICKLES, WRAPPERS, Source, whole_of

__all__ = ["BUNDLED", "Checkpoint", "convert", "load_image_tokenizer", "read", "save", "skeleton"]

BUNDLED = Path(__file__).parent.parent / "weights" / "emoji.safetensors"
IMAGE_TOKENIZERS = image_tokenizers.FAMILIES
MODELS = {"llamagen": llamagen, "janus": janus, "llama": llama}  # recognised in this order


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
) -> None:
    """Write the checkpoint at `source` in our own format, with one tensor in memory at a time.

    An image tokenizer without a model stays without one. `dtype` is the model's, by default that of
    its text embedding. Other arguments and errors are those of `read`; raises OSError if `output`
    cannot be written.
    """
    family = family or _family_of(source)
    if family in IMAGE_TOKENIZERS:
        card = {"modelspec.title": Source(source).name}
        return save_image_tokenizer(output, load_image_tokenizer(source, family=family), card)
    checkpoint = read(source, family, image_tokenizer=image_tokenizer, side=side, windows=windows)
    if checkpoint.kind:
        raise ValueError(
            f"{source}: its {checkpoint.kind} weights cannot be converted: copy the file"
        )
    config = checkpoint.config
    if dtype is None and "text_embedding.weight" in checkpoint.model_weights:
        dtype = checkpoint.model_weights["text_embedding.weight"]().dtype
    dtype = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    planned = {}
    for prefix, shape, weights, to in (
        ("model.", config.model, checkpoint.model_weights, dtype),
        (
            "image_tokenizer.",
            config.image_tokenizer,
            checkpoint.image_tokenizer_weights,
            torch.float32,
        ),
    ):
        where = f"{source}: {prefix}"
        for name, size in named_shapes(skeleton(shape), weights, where).items():
            compute = partial(checked, weights[name], f"{where}{name}", size)
            planned[f"{prefix}{name}"] = Planned(tuple(size), to, compute)
    metadata = native.metadata_of(
        config, checkpoint.text_tokenizer, checkpoint.card, checkpoint.vocabulary
    )
    return write_safetensors(output, planned, metadata)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 on CUDA devices that compute it natively, float16 on others, float32 elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float32


def _family_of(path: str | Path) -> str | None:
    """Which of FAMILIES it is, by tensor names that only this family has; None for any other
    safetensors file, such as our own. Raises FileNotFoundError or ValueError."""
    source = Source(path, (*WRAPPERS, "ema"))
    for family, module in MODELS.items():
        if any(mark in source for mark in module.MARKS):
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
