"""Captions of a picture in several languages, with or without its style."""

import random
from functools import cache
from itertools import accumulate

from .english import plural, with_article
from .phrases import PHRASES

UNSTYLED = 0.1  # share of captions without a style, so that such prompts work too
ENGLISH = 4  # English captions are this many times as frequent as those of any other language
KEYWORD = 0.2  # share of captions with another name than the first
LEAST, MOST = 12, 24  # captions of a composed picture

# A data set has a few hundred names, and a million captions of them.
_plural, _with_article = cache(plural), cache(with_article)


def prompt(subject: str, style: str | None, background: str = "white", language: str = "en") -> str:
    """The canonical caption: "a red apple, 3d style, on a blue background"."""
    return composed("single", [subject], style, background, language)


def composed(
    kind: str,
    names: list[str],
    style: str | None,
    background: str = "white",
    language: str = "en",
) -> str:
    """The canonical caption of a composed picture: "a cat left of a dog, flat style".

    `kind` as in `compose.Composition`; `names` has a name for each subject, which is repeated for
    copies.
    """
    canonical = _templates(kind, names, language)[0]
    return _with_surroundings(
        _filled(canonical, names, language, names), style, background, language
    )


def ways(kind: str, names: list[str], language: str, plain: list[str] | None = None) -> list[str]:
    """All ways to describe the subjects and their places, the canonical one first.

    `plain` are other names, which are used where no article or plural is needed.
    """
    return [
        _filled(template, names, language, plain or names)
        for template in _templates(kind, names, language)
    ]


def _templates(kind: str, names: list[str], language: str) -> tuple[str, ...]:
    return _of_kind(kind, language, language == "en" and _plural(names[0]) is not None)


@cache
def _of_kind(kind: str, language: str, has_plural: bool) -> tuple[str, ...]:
    templates = getattr(PHRASES[language], kind)
    return tuple(t for t in templates if has_plural or "{plural}" not in t)


def _filled(template: str, names: list[str], language: str, plain: list[str]) -> str:
    return template.format(
        first=plain[0],
        second=plain[-1],
        a_first=_with_article(names[0]),
        a_second=_with_article(names[-1]),
        plural=_plural(names[0]) if language == "en" else None,
        number=PHRASES[language].numbers.get(len(names)),
        digit=len(names),
    )


def write(record: dict, background: str, rng: random.Random) -> str:
    """A random caption for a record of the manifest."""
    language = _language(record["names"], rng)
    names = record["names"][language]
    subject = rng.choice(names) if rng.random() < KEYWORD else names[0]
    style = None if rng.random() < UNSTYLED else record["style"]
    form = rng.random()
    if form < 0.6 or language != "en":
        return prompt(subject, style, background, language)
    behind = "" if background == "white" else f" on {background}"
    if form < 0.8 and style:
        return f"{style} {subject}{behind}"
    return f"{subject}{f', {style} style' if style else ''}{behind}"


def variations(
    kind: str, names: list[dict[str, list[str]]], style: str, background: str, rng: random.Random
) -> list[str]:
    """12 to 24 different captions of a composed picture, or fewer if there are no more.

    `names` are, for each subject as in `composed`, the names in the manifest (language -> names).
    The canonical English caption comes first.
    """
    canonical = composed(kind, [each["en"][0] for each in names], style, background)
    captions = {canonical: None}
    wanted = rng.randint(LEAST, MOST)
    for _ in range(20 * wanted):
        if len(captions) == wanted:
            break
        captions[_variation(kind, names, style, background, rng)] = None
    return list(captions)


def _variation(kind: str, names, style: str, background: str, rng: random.Random) -> str:
    if kind == "single":
        return write({"names": names[0], "style": style}, background, rng)
    language = _language(names[0], rng)
    plain = first = [each[language][0] for each in names]
    # English names are selected by hand; others start with Unicode's, such as "Hundegesicht".
    if rng.random() < (KEYWORD if language == "en" else 2 * KEYWORD):
        other = {name: rng.choice(each[language]) for name, each in zip(first, names, strict=True)}
        plain = [other[name] for name in first]
    what = _filled(rng.choice(_templates(kind, first, language)), first, language, plain)
    named_style = None if rng.random() < 2 * UNSTYLED else style
    return _with_surroundings(what, named_style, background, language)


def _language(names: dict[str, list[str]], rng: random.Random) -> str:
    known, cumulated = _known(tuple(names))
    return rng.choices(known, cum_weights=cumulated)[0]


@cache
def _known(languages: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Those with phrases, and their cumulated weights."""
    known = [language for language in languages if language in PHRASES]
    return known, list(accumulate(ENGLISH if each == "en" else 1 for each in known))


def _with_surroundings(what: str, style: str | None, background: str, language: str) -> str:
    phrases, parts = PHRASES[language], [what]
    if style:
        parts.append(phrases.styles[style])
    if background != "white":
        parts.append(phrases.backgrounds[background])
    return phrases.comma.join(parts)
