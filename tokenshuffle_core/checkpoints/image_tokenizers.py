"""Image tokenizers in files of their own, ours or published: which one a file or folder holds."""

from pathlib import Path

from ..config import ImageTokenizerConfig
from . import cosmos, ibq, native, vq
from .checkpoint import Weights, named
from .source import EVERY_WRAPPER, Source

FAMILIES = {"ibq": ibq, "vq": vq, "cosmos": cosmos}


def read(path: str | Path) -> tuple[ImageTokenizerConfig, Weights]:
    """An image tokenizer's shape and weights: a published one, or one of ours, with or without a
    model. Raises FileNotFoundError or ValueError."""
    family = family_of(Source(path, EVERY_WRAPPER))
    return (FAMILIES[family].read if family else native.read_image_tokenizer)(path)


def family_of(source: Source) -> str | None:
    """Which of FAMILIES it is, by tensor names that only this family has; None for others. Raises
    ValueError for a VQGAN that may be one of two."""
    if ibq.is_one(source):
        return "ibq"
    for family, module in FAMILIES.items():
        if any(mark in source for mark in module.MARKS):
            return family
    return None


def is_alone(path: str | Path) -> bool:
    """Whether it is an image tokenizer without a model. Raises as `read`."""
    with named(path):
        source = Source(path, EVERY_WRAPPER)
        if family_of(source):
            return True
        return source.path.suffix.lower() == ".safetensors" and native.has_no_model(path)
