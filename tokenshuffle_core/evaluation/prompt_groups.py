"""Prompts made from the manifest of a data set, in groups that each ask something else of a model.

Only `variations` and `languages` are about the form of a prompt; in all others it is canonical.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

from torch import Tensor

from ..data.emoji import captions
from ..data.emoji.build import NAMED_BY_COLOUR
from ..data.emoji.compose import BOTTOM, LEFT, RIGHT, TOP
from ..data.emoji.english import plural, with_article
from ..data.emoji.phrases import PHRASES
from ..data.emoji.pictures import BACKGROUNDS
from ..data.emoji.plan import COLOURS, coloured, held_out_combinations
from .matching import References, colour_of
from .understanding import SEEDS, Prompt

WITH_ARTICLES = Path(__file__).with_name("prompts_with_articles.tsv")
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
# Harmless variations of "a red apple, 3d style", from the name and the style.
VARIATIONS: dict[str, Callable[[str, str], str]] = {
    "full stop": lambda name, style: f"{with_article(name)}, {style} style.",
    "exclamation mark": lambda name, style: f"{with_article(name)}, {style} style!",
    "capital letter": lambda name, style: f"{with_article(name)}, {style} style".capitalize(),
    "capitals": lambda name, style: f"{with_article(name)}, {style} style".upper(),
    "spaces": lambda name, style: f" {with_article(name)},  {style} style \n".replace(" ", "  "),
    "the": lambda name, style: f"the {name}, {style} style",
    "no article": lambda name, style: f"{name}, {style} style",
    "a picture of": lambda name, style: f"a picture of {with_article(name)}, {style} style",
    "emoji of": lambda name, style: f"emoji of {with_article(name)}, {style} style",
    "in style": lambda name, style: f"{with_article(name)} in {style} style",
    "style first": lambda name, style: f"{style} {name}",
    "full width": lambda name, style: f"{with_article(name)}, {style} style".translate(FULL_WIDTH),
}


def made(
    records: list[dict], references: References, group: str, count: int, seed: int
) -> list[Prompt]:
    """`count` prompts of a group of `GROUPS` in random order: every possible one once before any is
    repeated (with another seed of its picture); pairs are random ones. `records` is the manifest of
    the references. None, if the data set has nothing to ask for.
    """
    rng = random.Random(f"{seed} {group}")
    trained = [r for r in records if r["split"] == "train"]
    drawn = GROUPS[group](records, trained, references, rng)
    return [prompt for _, prompt in zip(range(count), drawn, strict=False)]


def _single(record: dict, prompt: str, group: str, **more) -> Prompt:
    return Prompt(prompt, group, ((record["subject"],),), record["style"], **more)


def _name(record: dict) -> str:
    return record["names"]["en"][0]


def _in_turn(items: list, rng: random.Random) -> Iterator:
    """All in random order, again and again."""
    items = list(items)
    rng.shuffle(items)
    return cycle(items)


def _by_kind(records: list, kinds: Iterable, rng: random.Random) -> Iterator[tuple]:
    """Every record of every kind, the kinds in turn, again and again."""
    for kind, records_in_turn in cycle([(kind, _in_turn(records, rng)) for kind in kinds]):
        if not records:
            return
        yield next(records_in_turn), kind


def _canonical(records, trained, references, rng) -> Iterator[Prompt]:
    for record in _in_turn(trained, rng):
        yield _single(record, captions.prompt(_name(record), record["style"]), "canonical")


def _held_out(records, trained, references, rng) -> Iterator[Prompt]:
    for record in _in_turn([r for r in records if r["split"] == "held-out"], rng):
        yield _single(record, captions.prompt(_name(record), record["style"]), "held-out")


def _variations(records, trained, references, rng) -> Iterator[Prompt]:
    for record, kind in _by_kind(trained, VARIATIONS, rng):
        text = VARIATIONS[kind](_name(record), record["style"])
        yield _single(record, text, "variations", kind=kind)


def _languages(records, trained, references, rng) -> Iterator[Prompt]:
    header, *lines = WITH_ARTICLES.read_text(encoding="utf-8").splitlines()
    _, *languages = header.split("\t")
    texts = {subject: each for subject, *each in (line.split("\t") for line in lines)}
    known = [r for r in trained if r["subject"] in texts]
    for record, language in _by_kind(known, languages, rng):
        phrases, text = PHRASES[language], texts[record["subject"]][languages.index(language)]
        text += phrases.comma + phrases.styles[record["style"]]
        yield _single(record, text, "languages", language=language, kind=language)


def _copies(group: str, *counts: int):
    english = PHRASES["en"]

    def draw(records, trained, references, rng) -> Iterator[Prompt]:
        countable = [r for r in trained if plural(_name(r))]
        for record, n in _by_kind(countable, counts, rng):
            number, style = english.numbers[n][0], english.styles[record["style"]]
            text = f"{number} {plural(_name(record))}, {style}"
            yield Prompt(text, group, ((record["subject"],),) * n, record["style"])

    return draw


def _apart(records: list[dict]) -> set[tuple[str, ...]]:
    """What a training of these pictures holds out, with its default settings."""
    return held_out_combinations(sorted({record["subject"] for record in records}))


def _pairs(records, trained, references, rng, held_out: bool = False) -> Iterator[Prompt]:
    """Of two different subjects, trained together or not; or only `held_out` ones."""
    group, apart = "held-out pairs" if held_out else "pairs", _apart(records)
    styles: dict[str, list[dict]] = {}
    for record in trained:
        styles.setdefault(record["style"], []).append(record)
    several = [r["style"] for r in trained if len(styles[r["style"]]) > 1]
    if held_out:
        known = {style: {r["subject"] for r in of} for style, of in styles.items()}
        pairs = [pair for pair in apart if len(set(pair)) == 2]
        several = [style for style in several if any(known[style].issuperset(p) for p in pairs)]
    places = {"beside": (LEFT, RIGHT), "above": (TOP, BOTTOM)}
    for kind, boxes in cycle(places.items() if several else ()):
        style = rng.choice(several)
        two = rng.sample(styles[style], 2)
        subjects = tuple(r["subject"] for r in two)
        if held_out and tuple(sorted(subjects)) not in apart:
            continue
        text = captions.composed(kind, [_name(r) for r in two], style)
        right = tuple((s,) for s in subjects)
        yield Prompt(text, group, right, style, boxes=boxes, kind=kind)


def _colours(records, trained, references, rng, held_out: bool = False) -> Iterator[Prompt]:
    """Of things that have one dominant colour, another one, trained or not; or only `held_out`
    ones. "A blue apple" may be a red or a green one."""
    group, apart = "held-out colours" if held_out else "colours", _apart(records)
    by_noun: dict[str, set[str]] = {}
    for record in records:
        by_noun.setdefault(_noun(record), set()).add(record["subject"])
    rows = {
        pair: i for i, pair in enumerate(zip(references.subjects, references.styles, strict=True))
    }
    row_of = [rows[r["subject"], r["style"]] for r in trained]
    known = [
        (record, row)
        for record, row in zip(trained, row_of, strict=True)
        if references.tones[row] and record["subject"] not in NAMED_BY_COLOUR
    ]
    own = {row: colour_of(_on_white(references, row), "white") for _, row in known}
    if held_out:
        asked = [
            (each, colour)
            for each in known
            for colour in COLOURS
            if coloured(each[0]["subject"], colour) in apart and colour != own[each[1]]
        ]
    for (record, row), colour in (
        _in_turn(asked, rng) if held_out else _by_kind(known, COLOURS, rng)
    ):
        if colour == own[row]:
            continue
        noun, style = _noun(record), record["style"]
        text = captions.prompt(noun, style, colour=colour)
        right = (tuple(sorted(by_noun[noun])),)
        yield Prompt(text, group, right, style, colours=(colour,), kind=colour)


def _on_white(references: References, row: int) -> Tensor:
    drawn, _ = references.drawn([row], None)
    return drawn[0, :3] + 1 - drawn[0, 3:]


def _noun(record: dict) -> str:
    """ "red apple" -> "apple"."""
    first, _, rest = _name(record).partition(" ")
    return rest if rest and first in BACKGROUNDS else _name(record)


def _backgrounds(records, trained, references, rng) -> Iterator[Prompt]:
    for record, colour in _by_kind(trained, COLOURS, rng):
        text = captions.prompt(_name(record), record["style"], colour)
        yield _single(record, text, "backgrounds", background=colour, kind=colour)


def _seeds(records, trained, references, rng) -> Iterator[Prompt]:
    """Each canonical prompt as many times as its seeds are compared."""
    for prompt in _canonical(records, trained, references, rng):
        for _ in range(SEEDS):
            yield prompt


GROUPS: dict[str, Callable[..., Iterator[Prompt]]] = {
    "canonical": _canonical,
    "variations": _variations,
    "languages": _languages,
    "held-out": _held_out,
    "counts": _copies("counts", 2, 3, 4),
    "five": _copies("five", 5),
    "pairs": _pairs,
    "held-out pairs": partial(_pairs, held_out=True),
    "colours": _colours,
    "held-out colours": partial(_colours, held_out=True),
    "backgrounds": _backgrounds,
    "seeds": _seeds,
}
