"""What the page is told about a checkpoint, from its metadata alone."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from ..tokenshuffle_core import checkpoint
from ..tokenshuffle_core.class_names import ClassNames
from ..tokenshuffle_core.config import Config, parse_sizes
from ..tokenshuffle_core.text_tokenizer import TextTokenizer

# `modified`, the file's time stamp, is there for the caches: a file written anew is read anew.


@lru_cache(maxsize=8)
def _metadata(path: Path, modified: float) -> tuple[Config, dict[str, str]]:
    metadata = checkpoint.read_metadata(path)
    if checkpoint.CONFIG not in metadata:
        raise ValueError(f"{path.name} is not a Token-Shuffle checkpoint")
    return Config.from_json(metadata[checkpoint.CONFIG]), metadata


@lru_cache(maxsize=2)
def _text_tokenizer(path: Path, modified: float) -> TextTokenizer | ClassNames:
    config, metadata = _metadata(path, modified)
    return checkpoint.read_text_tokenizer(metadata, config)


def describe(path: Path, modified: float) -> dict:
    """The model card, what sizes are possible (`stride` pixels are one token, a window of tokens is
    one position) and settings.

    `sizes` are those that the model was trained at, the default one first.
    """
    config, metadata = _metadata(path, modified)
    model, default = config.model, (config.generation.width, config.generation.height)
    trained = parse_sizes(metadata.get(checkpoint.SIZES, ""))
    return {
        "card": {key.partition(".")[2]: text for key, text in checkpoint.card(metadata).items()},
        "windows": model.windows,
        "stride": config.image_tokenizer.stride,
        "sizes": list(dict.fromkeys([default, *trained])),
        "max_grid": model.max_grid,
        "max_positions": model.max_positions,
        "generation": asdict(config.generation),
    }


def count_tokens(path: Path, modified: float, text: str) -> dict:
    tokens = len(_text_tokenizer(path, modified).encode(text))
    return {"tokens": tokens, "limit": _metadata(path, modified)[0].model.max_prompt}
