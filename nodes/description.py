"""What the page is told about a checkpoint, from its metadata alone."""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..tokenshuffle_core import checkpoints
from ..tokenshuffle_core.config import Config
from ..tokenshuffle_core.reading import Reader
from ..tokenshuffle_core.text_tokenizer import PromptEncoder
from ..tokenshuffle_core.vocabulary import Vocabulary

# `modified`, the time stamp of the file, is there for the cache: a changed file is read again.


class Metadata(NamedTuple):
    """Of a checkpoint, which itself would keep the file open."""

    config: Config
    card: dict[str, str]
    encoder: PromptEncoder
    vocabulary: Vocabulary | None


@lru_cache(maxsize=4)
def _read(path: Path, modified: float) -> Metadata:
    found = checkpoints.read(path)
    return Metadata(found.config, found.card, found.text_tokenizer, found.vocabulary)


@lru_cache(maxsize=4)
def _reader(path: Path, modified: float) -> Reader | None:
    _, _, encoder, vocabulary = _read(path, modified)
    return Reader(vocabulary, encoder.normalise) if vocabulary else None


def describe(path: Path, modified: float, language: str) -> dict:
    """The model card, the possible sizes (`stride` pixels are one code, a window of codes is one
    position), the settings, and what prompts may name.

    `sizes` are those that the model was trained at, the default one first; if its card does not say
    which, it draws `any_size`. `names` are those of the subjects in the `language`, or in English;
    none, and no `example` of a prompt, if the model's vocabulary is not closed.
    """
    config, card, _, vocabulary = _read(path, modified)
    model, default = config.model, (config.generation.width, config.generation.height)
    trained = checkpoints.trained_sizes(config, card)
    card = {key.partition(".")[2]: text for key, text in card.items()}
    known = {"names": [], "example": ""}
    if vocabulary:
        language = language if language in vocabulary.languages else vocabulary.languages[0]
        known = {"names": vocabulary.names(language), "example": vocabulary.example(language)}
        card["subjects"] = ", ".join(known["names"])
    return known | {
        "card": card,
        "windows": model.windows,
        "stride": config.image_tokenizer.stride,
        "sizes": trained or [default],
        "any_size": not trained,
        "max_grid": model.max_grid,
        "max_positions": model.max_positions,
        "generation": asdict(config.generation),
    }


def read_prompt(path: Path, modified: float, text: str, language: str) -> dict:
    """Its `tokens`, of at most `limit`; and with a closed vocabulary, what the model `draws` of it
    and the words that it does not know, each with a similar name or ""."""
    config, _, encoder, _ = _read(path, modified)
    counted = {"tokens": len(encoder.encode(text)), "limit": config.model.max_prompt}
    reader = _reader(path, modified)
    if not reader:
        return counted
    found = reader.read(text, language)
    return counted | {"draws": [*found.subjects, *found.others], "unknown": found.unknown}
