"""What the page is told about a checkpoint, from its metadata alone."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from ..tokenshuffle_core import checkpoints
from ..tokenshuffle_core.config import Config, parse_sizes
from ..tokenshuffle_core.text_tokenizer import PromptEncoder

# `modified`, the time stamp of the file, is there for the cache: a changed file is read again.


@lru_cache(maxsize=4)
def _read(path: Path, modified: float) -> tuple[Config, dict[str, str], PromptEncoder]:
    """Configuration, card and prompt encoder. The checkpoint itself would keep the file open."""
    checkpoint = checkpoints.read(path)
    return checkpoint.config, checkpoint.card, checkpoint.text_tokenizer


def describe(path: Path, modified: float) -> dict:
    """The model card, the possible sizes (`stride` pixels are one code, a window of codes is one
    position) and the settings.

    `sizes` are those that the model was trained at, the default one first.
    """
    config, card, _ = _read(path, modified)
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
    config, _, encoder = _read(path, modified)
    return {"tokens": len(encoder.encode(text)), "limit": config.model.max_prompt}
