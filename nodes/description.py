"""What the page is told about a checkpoint, from its metadata alone."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from ..tokenshuffle_core import checkpoints
from ..tokenshuffle_core.config import parse_sizes

# `modified`, the time stamp of the file, is there for the cache: a changed file is read again.


@lru_cache(maxsize=4)
def _read(path: Path, modified: float) -> checkpoints.Checkpoint:
    return checkpoints.read(path)


def describe(path: Path, modified: float) -> dict:
    """The model card, the possible sizes (`stride` pixels are one code, a window of codes is one
    position) and the settings.

    `sizes` are those that the model was trained at, the default one first.
    """
    found = _read(path, modified)
    config, card = found.config, found.card
    model, default = config.model, (config.generation.width, config.generation.height)
    trained = parse_sizes(card.get(checkpoints.SIZES, ""))
    return {
        "card": {key.partition(".")[2]: text for key, text in card.items()},
        "windows": model.windows,
        "stride": config.image_tokenizer.stride,
        "sizes": list(dict.fromkeys([default, *trained])),
        "max_grid": model.max_grid,
        "max_positions": model.max_positions,
        "generation": asdict(config.generation),
    }


def count_tokens(path: Path, modified: float, text: str) -> dict:
    found = _read(path, modified)
    tokens = len(found.text_tokenizer.encode(text))
    return {"tokens": tokens, "limit": found.config.model.max_prompt}
