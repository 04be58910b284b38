"""Captions: what a picture may be called, in several languages, with or without its style."""

import random

from .english import plural, with_article
from .phrases import PHRASES

UNSTYLED = 0.1  # the share of captions that name no style, so that such prompts work too
ENGLISH = 4  # a caption is English this many times as often as in any other language
KEYWORD = 0.2  # the share of captions that use another name than the first
LEAST, MOST = 12, 24  # how many captions a composed picture gets


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

    `kind` as in `compose.Composition`; `names` holds one name for each subject placed, and the
    same one several times for several copies.
    """
    return _with_surroundings(ways(kind, names, language)[0], style, background, language)


def ways(kind: str, names: list[str], language: str, plain: list[str] | None = None) -> list[str]:
    """All ways to say what is placed, the canonical one first.

    `plain` are other names to use where the grammar does not matter.
    """
    phrases, plain = PHRASES[language], plain or names
    several = plural(names[0]) if language == "en" else None
    fields = {
        "first": plain[0],
        "second": plain[-1],
        "a_first": with_article(names[0]),
        "a_second": with_article(names[-1]),
        "plural": several,
        "number": phrases.numbers.get(len(names)),
        "digit": len(names),
    }
    templates = getattr(phrases, kind)
    if several is None:
        templates = [template for template in templates if "{plural}" not in template]
    return [template.format(**fields) for template in templates]


def write(record: dict, background: str, rng: random.Random) -> str:
    """One caption for a manifest record, drawn from many ways to say it."""
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
    """12 to 24 different captions of a composed picture (fewer where there are not as many).

    `names` are the manifest's names, language -> names, of each subject placed, as in `composed`.
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
    first = [each[language][0] for each in names]
    plain = first
    # English names are chosen by hand; elsewhere the first is Unicode's, such as "Hundegesicht".
    if rng.random() < (KEYWORD if language == "en" else 2 * KEYWORD):
        other = {name: rng.choice(each[language]) for name, each in zip(first, names, strict=True)}
        plain = [other[name] for name in first]
    what = rng.choice(ways(kind, first, language, plain))
    named_style = None if rng.random() < 2 * UNSTYLED else style
    return _with_surroundings(what, named_style, background, language)


def _language(names: dict[str, list[str]], rng: random.Random) -> str:
    known = [language for language in names if language in PHRASES]
    return rng.choices(known, [ENGLISH if language == "en" else 1 for language in known])[0]


def _with_surroundings(what: str, style: str | None, background: str, language: str) -> str:
    phrases, parts = PHRASES[language], [what]
    if style:
        parts.append(phrases.styles[style])
    if background != "white":
        parts.append(phrases.backgrounds[background])
    return phrases.comma.join(parts)
