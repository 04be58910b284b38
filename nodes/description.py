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

# The fields of a card that the page shows; strings.js has their titles.
CARD = (
    "title", "description", "usage_hint", "sizes", "scores", "limits", "data", "training",
    "license", "author", "date",
)  # fmt: skip
# A stranger's file may hold a hundred megabytes of text, of which the page gets no more than:
MAX_FIELD = 10_000  # characters of a field of the card
MAX_NAME = 100  # characters
MAX_NAMES = 5_000  # and sizes


class Metadata(NamedTuple):
    """Of a checkpoint, which itself would keep the file open."""

    config: Config
    card: dict[str, str]
    encoder: PromptEncoder
    vocabulary: Vocabulary | None


# `version`, another text whenever the file is written, is for the cache: it is read again then.
@lru_cache(maxsize=4)
def _read(path: Path, version: str) -> Metadata:
    found = checkpoints.read(path)
    return Metadata(found.config, found.card, found.text_tokenizer, found.vocabulary)


@lru_cache(maxsize=4)
def _reader(path: Path, version: str) -> Reader | None:
    _, _, encoder, vocabulary = _read(path, version)
    return Reader(vocabulary, encoder.normalise) if vocabulary else None


def describe(path: Path, version: str, language: str) -> dict:
    """The model card, the possible sizes (`stride` pixels are one code, a window of codes is one
    position), the settings, and what prompts may name.

    `sizes` are those that the model was trained at, the default one first; if its card does not say
    which, it draws `any_size`. `names` are those of the subjects in the `language`, or in English;
    none, and no `example` of a prompt, if the model's vocabulary is not closed. What is longer than
    a page shows is cut.
    """
    config, card, _, vocabulary = _read(path, version)
    model, default = config.model, (config.generation.width, config.generation.height)
    trained = checkpoints.trained_sizes(config, card)
    card = {key.partition(".")[2]: text for key, text in card.items()}
    card = {key: _cut(card[key]) for key in CARD if key in card}
    known = {"names": [], "example": ""}
    if vocabulary:
        language = language if language in vocabulary.languages else vocabulary.languages[0]
        names = [name for name in vocabulary.names(language) if len(name) <= MAX_NAME]
        known = {"names": names[:MAX_NAMES], "example": _cut(vocabulary.example(language))}
        card["subjects"] = _cut(", ".join(known["names"]))
    return known | {
        "card": card,
        "windows": model.windows,
        "stride": config.image_tokenizer.stride,
        "sizes": trained[:MAX_NAMES] or [default],
        "any_size": not trained,
        "max_grid": model.max_grid,
        "max_positions": model.max_positions,
        "generation": asdict(config.generation),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_FIELD else text[:MAX_FIELD] + "…"


def read_prompt(path: Path, version: str, text: str, language: str) -> dict:
    """Its `tokens`, of at most `limit`; and with a closed vocabulary, what the model `draws` of it
    and the words that it does not know, each with a similar name or ""."""
    config, _, encoder, _ = _read(path, version)
    counted = {"tokens": len(encoder.encode(text)), "limit": config.model.max_prompt}
    reader = _reader(path, version)
    if not reader:
        return counted
    found = reader.read(text, language)
    return counted | {"draws": [*found.subjects, *found.others], "unknown": found.unknown}
