"""Our own format: one safetensors file with the model, the image tokenizer, the text tokenizer, the
configuration and a model card.

Weights carry the prefix `model.` or `image_tokenizer.`; everything else is JSON or text in the
file's metadata. The card uses the keys of the ModelSpec standard (`modelspec.title`, ...). An
image tokenizer can also have a file of its own.
"""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..class_names import ClassNames
from ..config import Config, GenerationConfig, ImageTokenizerConfig, parse_sizes
from ..engine.quantize import kind_of, quantized_names
from ..files import Planned, open_safetensors, write_safetensors
from ..image_tokenizer import ImageTokenizer
from ..model import TokenShuffleModel
from ..text_tokenizer import PromptEncoder, TextTokenizer
from ..vocabulary import Vocabulary
from .checkpoint import Checkpoint, Weights, check_parts
from .source import whole_of

CONFIG = "tokenshuffle.config"
IMAGE_TOKENIZER = "tokenshuffle.image_tokenizer"
TEXT_TOKENIZER = "tokenshuffle.text_tokenizer"
WEIGHTS = "tokenshuffle.weights"  # the kind of quantised weights; no such key without them
PROMPTS = "tokenshuffle.prompts"  # the prompt encoder's kind
VOCABULARY = "tokenshuffle.vocabulary"  # what a model with a closed vocabulary knows
SIZES = "tokenshuffle.sizes"  # part of the card: the sizes that the model was trained on
ARCHITECTURE = "token-shuffle"
MAX_CARD = 2**20  # characters; it may hold a thumbnail
FOR_MACHINES = (CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER, WEIGHTS, PROMPTS, VOCABULARY)


def read(path: str | Path) -> Checkpoint:
    """Raises FileNotFoundError or ValueError."""
    file = open_safetensors(path)
    metadata = file.metadata() or {}
    if CONFIG not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but not a Token-Shuffle checkpoint{whole_of(path)}"
        )
    if TEXT_TOKENIZER not in metadata:
        raise ValueError(f"{path} is a checkpoint without its text tokenizer: save it again")
    text = metadata[TEXT_TOKENIZER]
    # Older files lack the key; their class names are recognised by how they begin.
    kind = metadata.get(PROMPTS, "classes" if text.startswith('{"classes"') else "text")
    card = {key: value for key, value in metadata.items() if key not in FOR_MACHINES}
    if sum(map(len, card.values())) > MAX_CARD:
        raise ValueError(f"{path}: its model card has more than {MAX_CARD} characters")
    config = Config.from_json(metadata[CONFIG])
    if kind == ClassNames.kind:
        text_tokenizer = ClassNames.from_json(text)
    else:
        text_tokenizer = TextTokenizer.from_json(text, config.prompt)
    trained_sizes(config, card)
    vocabulary = Vocabulary.from_json(metadata[VOCABULARY]) if VOCABULARY in metadata else None
    return Checkpoint(
        Path(path),
        config,
        text_tokenizer,
        card,
        _weights(file, "model."),
        _weights(file, "image_tokenizer."),
        metadata.get(WEIGHTS),
        vocabulary,
    )


def trained_sizes(config: Config, card: dict[str, str]) -> list[tuple[int, int]]:
    """The sizes (width, height) that the model was trained at, its default one first; [] if its
    card does not say. Raises ValueError for a card with something else."""
    sizes = parse_sizes(card.get(SIZES, ""))
    default = config.generation.width, config.generation.height
    return list(dict.fromkeys([default, *sizes])) if sizes else []


def card_of_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, str]:
    """The part of a card that `trained_sizes` reads: sizes (width, height), the default first."""
    names = [f"{width}x{height}" for width, height in sizes]
    return {"modelspec.resolution": names[0], SIZES: ", ".join(names)}


def is_trained_at(config: Config, card: dict[str, str], settings: GenerationConfig) -> bool:
    """Whether the model was trained at this size, as far as its card says."""
    sizes = trained_sizes(config, card)
    return not sizes or (settings.width, settings.height) in sizes


def check_size(config: Config, card: dict[str, str], settings: GenerationConfig) -> None:
    """Raises ValueError, which names the trained sizes, the nearest first, for another one, unless
    the settings allow `any_size`."""
    if not settings.any_size and not is_trained_at(config, card, settings):
        width, height, sizes = settings.width, settings.height, trained_sizes(config, card)
        sizes.sort(key=lambda size: abs(size[0] - width) + abs(size[1] - height))
        raise ValueError(
            f"this model was not trained at {width}x{height}: choose "
            f"{', '.join(f'{w}x{h}' for w, h in sizes)}, or ask for it all the same with any_size "
            "(on the command line --any-size, in ComfyUI an input of Token-Shuffle Options)"
        )


def has_no_model(path: str | Path) -> bool:
    """Whether it is an image tokenizer in a file of its own. Raises as `read`."""
    metadata = open_safetensors(path).metadata() or {}
    return IMAGE_TOKENIZER in metadata and CONFIG not in metadata


def read_image_tokenizer(path: str | Path) -> tuple[ImageTokenizerConfig, Weights]:
    """The image tokenizer of a checkpoint or of a file of its own. Raises as `read`."""
    file = open_safetensors(path)
    metadata = file.metadata() or {}
    if IMAGE_TOKENIZER not in metadata:
        raise ValueError(f"{path} does not hold a Token-Shuffle image tokenizer")
    try:
        config = ImageTokenizerConfig.from_fields(json.loads(metadata[IMAGE_TOKENIZER]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the image tokenizer's configuration: {error}") from None
    weights = _weights(file, "image_tokenizer.")
    check_parts(config, weights)
    return config, weights


def save(
    path: str | Path,
    config: Config,
    model: TokenShuffleModel,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: PromptEncoder,
    card: dict[str, str],
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint; `dtype` converts all weights except quantised ones. By default, the
    model's are written in the type that it computes in. Raises OSError."""
    metadata = metadata_of(config, text_tokenizer, card, vocabulary, kind_of(model))
    computes_in = model.code_embedding.weight.dtype
    parts = {"model": (model, dtype or computes_in), "image_tokenizer": (image_tokenizer, dtype)}
    _write(path, parts, metadata)


def save_image_tokenizer(
    path: str | Path, module: ImageTokenizer, card: dict[str, str] | None = None
) -> None:
    """Write an image tokenizer without a model."""
    metadata = {**(card or {}), IMAGE_TOKENIZER: _to_json(module.config)}
    _write(path, {"image_tokenizer": (module, None)}, metadata)


def metadata_of(
    config: Config,
    text_tokenizer: PromptEncoder,
    card: dict[str, str],
    vocabulary: Vocabulary | None,
    kind: str | None,
) -> dict[str, str]:
    """Everything in a file except the weights; `kind` is that of quantised ones."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        **card,
        CONFIG: config.to_json(),
        IMAGE_TOKENIZER: _to_json(config.image_tokenizer),
        TEXT_TOKENIZER: text_tokenizer.to_json(),
        PROMPTS: text_tokenizer.kind,
    }
    metadata |= {VOCABULARY: vocabulary.to_json()} if vocabulary else {}
    return metadata | ({WEIGHTS: kind} if kind else {})


def _weights(file, prefix: str) -> Weights:
    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
    return {name.removeprefix(prefix): partial(file.get_tensor, name) for name in names}


def _to_json(config: ImageTokenizerConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def _write(
    path: str | Path,
    parts: dict[str, tuple[nn.Module, torch.dtype | None]],
    metadata: dict[str, str],
) -> None:
    tensors = {}
    for prefix, (module, dtype) in parts.items():
        kept = quantized_names(module)
        for name, tensor in module.state_dict().items():
            to = tensor.dtype if name in kept else dtype or tensor.dtype
            compute = partial(tensor.to, "cpu", to)
            tensors[f"{prefix}.{name}"] = Planned(tuple(tensor.shape), to, compute)
    write_safetensors(path, tensors, metadata)
