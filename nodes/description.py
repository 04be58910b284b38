"""What the page is told about a checkpoint, from its metadata alone."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..tokenshuffle_core.checkpoints import families
from ..tokenshuffle_core.checkpoints import native as checkpoint
from ..tokenshuffle_core.class_names import ClassNames
from ..tokenshuffle_core.config import Config, parse_sizes
from ..tokenshuffle_core.text_tokenizer import TextTokenizer

# `modified`, the time stamp of the file, is there for the caches: a changed file is read again.


class Facts(NamedTuple):
    config: Config
    card: dict[str, str]
    text_tokenizer: TextTokenizer | ClassNames


@lru_cache(maxsize=4)
def _facts(path: Path, modified: float) -> Facts:
    if families.is_published(path):
        published = families.read(path)
        return Facts(published.config, published.card, published.text_tokenizer)
    metadata = checkpoint.read_metadata(path)
    if checkpoint.CONFIG not in metadata:
        raise ValueError(f"{path.name} is not a Token-Shuffle checkpoint")
    config = Config.from_json(metadata[checkpoint.CONFIG])
    return Facts(
        config, checkpoint.card(metadata), checkpoint.read_text_tokenizer(metadata, config)
    )


def describe(path: Path, modified: float) -> dict:
    """The model card, the possible sizes (`stride` pixels are one code, a window of codes is one
    position) and the settings.

    `sizes` are those that the model was trained at, the default one first.
    """
    config, card, _ = _facts(path, modified)
    model, default = config.model, (config.generation.width, config.generation.height)
    trained = parse_sizes(card.get(checkpoint.SIZES, ""))
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
    facts = _facts(path, modified)
    tokens = len(facts.text_tokenizer.encode(text))
    return {"tokens": tokens, "limit": facts.config.model.max_prompt}
