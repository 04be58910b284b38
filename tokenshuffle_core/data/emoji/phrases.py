"""The parts of captions in each language, from phrases.json: styles, colours, numbers, places.

A caption puts phrases side by side. No name is inflected, and an adjective comes in all its forms,
whatever the noun: what a model reads may be ungrammatical. Templates contain {first}, {second} and
{third}, the names of the subjects; English ones also {a_first} and {a_second}, with an article, and
{plural}. The first template of a kind is the canonical one.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .compose import COUNTS
from .pictures import BACKGROUNDS

PAIRS = ("{here} {first}, {there} {second}", "{there} {second}, {here} {first}")
STYLE_NAMES = ("3d", "modern", "flat", "noto")


@dataclass(frozen=True)
class Phrases:
    """Where a language lacks `adjectives`, it lacks all that follows them."""

    styles: dict[str, str]  # style -> phrase
    backgrounds: dict[str, str]  # name of the colour -> phrase
    numbers: dict[int, tuple[str, ...]]  # 2 to 5 -> words
    count: tuple[str, ...]  # these also contain {number} or {digit}
    beside: tuple[str, ...]  # {first} is at the left
    above: tuple[str, ...]  # {first} is at the top
    single: tuple[str, ...] = ("{first}",)
    comma: str = ", "
    adjectives: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of colours, all forms
    attributed: str = "{adjective} {name}"
    small: tuple[str, ...] = ()  # {} is the name
    big: tuple[str, ...] = ()
    in_styles: dict[str, str] = field(default_factory=dict)  # style -> {} is what is drawn
    leads: tuple[str, ...] = ()  # "a picture of {}"
    row: tuple[str, ...] = ()
    corners: tuple[str, ...] = ()  # top left, top right, bottom left, bottom right
    corner_pairs: tuple[str, ...] = PAIRS  # {first} is {here}, {second} is {there}


def _phrases(
    styles,
    background,
    colours,
    numbers,
    places=None,
    pairs=PAIRS,
    joined="",
    beside_too=(),
    above_too=(),
    **more,
) -> Phrases:
    """The phrases of a language in the file. `places` are words for left, right, top and bottom,
    which `pairs`, the templates for two subjects, contain as {here} (of the first subject) and
    {there} (of the second); a language without them has `beside` and `above`. `joined` is the word
    between two names, "and"; `beside_too` and `above_too` are further templates."""
    comma = more.get("comma", ", ")
    if places:
        for kind, (here, there) in (("beside", places[:2]), ("above", places[2:])):
            more[kind] = [t.replace("{here}", here).replace("{there}", there) for t in pairs]
    more["beside"] = [*more["beside"], *beside_too]
    more["above"] = [*more["above"], *above_too]
    if joined:
        more["beside"] += [f"{{first}}{joined}{{second}}"]
        more["row"] = [f"{{first}}{comma}{{second}}{joined}{{third}}"]
        more["row"] += [f"{{first}}{comma}{{second}}{comma}{{third}}"]
    if "adjectives" in more:
        forms = [tuple(each.split("/")) for each in more["adjectives"]]
        more["adjectives"] = dict(zip(BACKGROUNDS, forms, strict=True))
        more["in_styles"] = dict(zip(STYLE_NAMES, more["in_styles"], strict=True))
    names = zip(BACKGROUNDS, colours, strict=True)
    return Phrases(
        styles=dict(zip(STYLE_NAMES, styles, strict=True)),
        backgrounds={name: background.format(colour) for name, colour in names},
        numbers=dict(zip(COUNTS, (tuple(each.split("/")) for each in numbers), strict=True)),
        **{name: tuple(value) if type(value) is list else value for name, value in more.items()},
    )


FILE = Path(__file__).with_name("phrases.json")
PHRASES: dict[str, Phrases] = {
    language: _phrases(**table)
    for language, table in json.loads(FILE.read_text(encoding="utf-8")).items()
}
