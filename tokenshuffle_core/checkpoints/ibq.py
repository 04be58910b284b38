"""IBQ (arXiv 2412.02692), the image tokenizer of Emu3.5 (arXiv 2510.26583): VQGAN's layers around a
codebook whose vectors are taken as they are."""

from pathlib import Path

from ..config import ImageTokenizerConfig
from . import vq
from .checkpoint import Weights
from .source import Source

MARKS = ()  # its names are those of any VQGAN
# Codes of Emu3.5's. No other VQGAN has as many: those that take the nearest vector stop at 16,384.
LEAST = 2**17


def read(path: str | Path) -> tuple[ImageTokenizerConfig, Weights]:
    """A file, or a folder with config.yaml and model.ckpt or one that `transformers` reads. Raises
    FileNotFoundError or ValueError."""
    source = Source(path)
    return vq.image_tokenizer(source, _prefix(source) or "", "dot")


def is_one(source: Source) -> bool:
    """Raises ValueError for a VQGAN that may be one."""
    if (prefix := _prefix(source)) is None:
        return False
    if vq.layout_of({name.removeprefix(prefix) for name in source.shapes}) is not vq.VQGAN:
        return False
    size, _ = source.shape_of(f"{prefix}{vq.MARKS[0]}", 2)
    if size < LEAST:
        raise ValueError(
            f"{source.path} is a VQGAN with {size} codes, and its weights do not tell whether a "
            "code is the nearest vector, which is not supported, or as in IBQ: if so, convert it "
            "with --family ibq"
        )
    return True


def _prefix(source: Source) -> str | None:
    """What stands before its names, in the files of some; None if there is no codebook, or two."""
    ends = [name for name in source.shapes if f".{name}".endswith(f".{vq.MARKS[0]}")]
    return ends[0].removesuffix(vq.MARKS[0]) if len(ends) == 1 else None
