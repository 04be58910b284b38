"""Published checkpoints, of whatever family, as one of our own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import pipeline
from ..files import TYPES, Planned, write_safetensors_in_turn
from ..image_tokenizer import ImageTokenizer
from ..model import TokenShuffleModel
from . import FAMILIES, janus, llama, llamagen, vq
from . import native as checkpoint
from .published import Published, Weights, meta
from .source import PICKLES, WRAPPERS, Source


def family_of(source: Source) -> str:
    """Which of FAMILIES it is, by names that only these have. Raises ValueError."""
    if llamagen.MARK in source:
        return "llamagen"
    if any(mark in source for mark in janus.MARKS):
        return "janus"
    if llama.MARK in source:
        return "llama"
    if "quantize.embedding.weight" in source:
        return "vq"
    raise ValueError(
        f"{source.path} is of no family that is known here ({', '.join(FAMILIES)}): it has weights "
        f"such as {', '.join(sorted(source.shapes)[:3])}"
    )


def is_published(path: str | Path) -> bool:
    """Whether it is a folder or a pickle, not a checkpoint of our own."""
    return Path(path).is_dir() or Path(path).suffix in PICKLES


def read(
    path: str | Path,
    family: str | None = None,
    image_tokenizer: Path | None = None,
    side: int | None = None,
    windows: tuple[int, ...] | None = None,
) -> Published:
    """What lies at `path`; `image_tokenizer` is the file of one that comes apart. Raises
    FileNotFoundError, or ValueError with one sentence."""
    published = _read(Source(path), family, image_tokenizer, side, windows)
    tokens, rows = len(published.text_tokenizer), published.config.model.text_vocabulary
    if tokens > rows:
        raise ValueError(f"{path}: its text tokenizer has {tokens} tokens, the model {rows}")
    return published


def _read(source: Source, family, image_tokenizer, side, windows) -> Published:
    family = family or family_of(source)
    if windows and family != "llama":
        raise ValueError("windows are chosen for a LLaMA; other models are grown")
    if family == "llamagen":
        return llamagen.read(source, image_tokenizer, side)
    if family == "janus":
        return janus.read(source, image_tokenizer, side)
    if family == "llama":
        return llama.read(source, image_tokenizer, side, windows or (2,))
    raise ValueError(f"{source.path}: a model must be of llamagen, janus or llama, not {family}")


def load(path: str | Path, device: str | torch.device = "cpu", dtype=None) -> pipeline.Pipeline:
    """A pipeline from a checkpoint of our own or a published one. Raises as `read` and
    `pipeline.load`."""
    if not is_published(path):
        return pipeline.load(path, device, dtype)
    published = read(path)
    dtype = dtype or checkpoint.default_dtype(device)
    config, path = published.config, published.path
    return pipeline.Pipeline(
        config,
        _filled(TokenShuffleModel, config.model, published.model, path, device, dtype),
        _filled(
            ImageTokenizer, config.image_tokenizer, published.image_tokenizer, path, device,
            torch.float32,
        ),
        published.text_tokenizer,
        published.card,
    )  # fmt: skip


def convert(published: Published, output: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write one checkpoint of our own, a tensor at a time. `dtype` is the model's, by default that
    of its text embedding. Raises ValueError, OSError."""
    config = published.config
    dtype = dtype or published.model["text_embedding.weight"]().dtype
    dtype = dtype if dtype in TYPES else torch.float32
    planned = {}
    for prefix, module, shape, weights, to in (
        ("model", TokenShuffleModel, config.model, published.model, dtype),
        (
            "image_tokenizer", ImageTokenizer, config.image_tokenizer,
            published.image_tokenizer, torch.float32,
        ),
    ):  # fmt: skip
        for name, size in meta(module, shape).items():
            key = f"{prefix}.{name}"
            make = partial(checked, weights[name], key, size, published.path)
            planned[key] = Planned(tuple(size), to, make)
    metadata = checkpoint.metadata_of(config, published.text_tokenizer, published.card)
    write_safetensors_in_turn(output, planned, metadata)


def load_image_tokenizer(path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
    """The image tokenizer of a checkpoint of our own or a published one, or one that stands alone.
    Raises as `load`."""
    if not is_published(path):
        return checkpoint.load_image_tokenizer(path, device)
    source = Source(path, ("ema", *WRAPPERS))
    family = family_of(source)
    if family == "vq":
        config, weights = vq.image_tokenizer(source)
    else:
        published = read(path, family)
        config, weights = published.config.image_tokenizer, published.image_tokenizer
    return _filled(ImageTokenizer, config, weights, source.path, device, torch.float32)


def _filled(make: Callable, config, weights: Weights, path: Path, device, dtype) -> nn.Module:
    """The module of this shape with its weights, for inference."""
    with torch.device("meta"):
        module = make(config)
    found = {
        name: checked(weights[name], name, empty.shape, path).to(device, dtype)
        for name, empty in module.state_dict().items()
    }
    module.load_state_dict(found, assign=True)
    return module.eval()


def checked(read: Callable[[], Tensor], name: str, shape: torch.Size, path: Path) -> Tensor:
    """The tensor, of the shape that its configuration asks for. Raises ValueError."""
    x = read()
    if x.shape != shape:
        raise ValueError(f"{path}: {name} has the shape {tuple(x.shape)}, not {tuple(shape)}")
    return x
