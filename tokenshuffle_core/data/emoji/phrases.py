"""The parts of captions in each language, from phrases.json: styles, backgrounds, numbers, places.

A caption puts phrases side by side, so that no name has to be inflected. Templates contain
{first} and {second}, the names of the subjects; English ones also {a_first} and {a_second}, with
an article, and {plural}. The first template of a kind is the canonical one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .pictures import BACKGROUNDS

PAIRS = ("{here} {first}, {there} {second}", "{there} {second}, {here} {first}")


@dataclass(frozen=True)
class Phrases:
    styles: dict[str, str]  # style -> phrase
    backgrounds: dict[str, str]  # name of the colour -> phrase
    numbers: dict[int, str]  # 2, 3 and 4 -> word
    count: tuple[str, ...]  # these also contain {number} or {digit}
    beside: tuple[str, ...]  # {first} is at the left
    above: tuple[str, ...]  # {first} is at the top
    single: tuple[str, ...] = ("{first}",)
    comma: str = ", "


def _phrases(styles, background, colours, numbers, places=None, pairs=PAIRS, **more) -> Phrases:
    """The phrases of a language in the file. `places` are words for left, right, top and bottom,
    which `pairs`, the templates for two subjects, contain as {here} (of the first subject) and
    {there} (of the second); a language without them has `beside` and `above`."""
    if places:
        for kind, (here, there) in (("beside", places[:2]), ("above", places[2:])):
            more[kind] = [t.replace("{here}", here).replace("{there}", there) for t in pairs]
    names = zip(BACKGROUNDS, colours, strict=True)
    return Phrases(
        styles=dict(zip(("3d", "modern", "flat", "noto"), styles, strict=True)),
        backgrounds={name: background.format(colour) for name, colour in names},
        numbers=dict(zip((2, 3, 4), numbers, strict=True)),
        **{name: tuple(value) if type(value) is list else value for name, value in more.items()},
    )


FILE = Path(__file__).with_name("phrases.json")
PHRASES: dict[str, Phrases] = {
    language: _phrases(**table)
    for language, table in json.loads(FILE.read_text(encoding="utf-8")).items()
}
