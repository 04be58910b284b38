"""What the page is told about a checkpoint, from its metadata alone."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from ..tokenshuffle_core import checkpoints
from ..tokenshuffle_core.config import Config
from ..tokenshuffle_core.text_tokenizer import PromptEncoder

# `modified`, the time stamp of the file, is there for the cache: a changed file is read again.


@lru_cache(maxsize=4)
def _read(path: Path, modified: float) -> tuple[Config, dict[str, str], PromptEncoder]:
    """Configuration, card and prompt encoder. The checkpoint itself would keep the file open."""
    checkpoint = checkpoints.read(path)
    card = dict(checkpoint.card)
    if checkpoint.vocabulary:
        card["tokenshuffle.subjects"] = ", ".join(checkpoint.vocabulary.names())
    return checkpoint.config, card, checkpoint.text_tokenizer


def describe(path: Path, modified: float) -> dict:
    """The model card, the possible sizes (`stride` pixels are one code, a window of codes is one
    position) and the settings.

    `sizes` are those that the model was trained at, the default one first; if its card does not say
    which, it draws `any_size`.
    """
    config, card, _ = _read(path, modified)
    model, default = config.model, (config.generation.width, config.generation.height)
    trained = checkpoints.trained_sizes(config, card)
    return {
        "card": {key.partition(".")[2]: text for key, text in card.items()},
        "windows": model.windows,
        "stride": config.image_tokenizer.stride,
        "sizes": trained or [default],
        "any_size": not trained,
        "max_grid": model.max_grid,
        "max_positions": model.max_positions,
        "generation": asdict(config.generation),
    }


def count_tokens(path: Path, modified: float, text: str) -> dict:
    config, _, encoder = _read(path, modified)
    return {"tokens": len(encoder.encode(text)), "limit": config.model.max_prompt}
