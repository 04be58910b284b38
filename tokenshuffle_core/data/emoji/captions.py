"""Captions of a picture in several languages, in the forms that people write.

What the text tokenizer's normalisation removes, such as articles and a final full stop, is not
varied here.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from .compose import Composition
from .english import plural, with_article
from .phrases import PHRASES, Phrases

UNSTYLED = 0.15  # share of captions without a style, so that such prompts work too
ENGLISH = 4  # English captions are this many times as frequent as those of any other language
KEYWORD = 0.25  # share of English captions with another name than the first
# English names are selected by hand; others start with Unicode's, such as "Hundegesicht".
FOREIGN_KEYWORD = 0.4
LED = 0.1  # share of captions that begin with "a picture of" and the like
CANONICAL = 0.4  # share with the style in the canonical form
LEAST, MOST = 12, 24  # captions of a composed picture

# What a subject is called in another colour, where its name has one already.
BARE: dict[str, dict[str, str]] = {
    "red apple": {
        "en": "apple", "zh": "苹果", "ja": "りんご", "ko": "사과", "de": "apfel", "fr": "pomme",
        "es": "manzana", "pt": "maçã", "it": "mela", "ru": "яблоко",
    },
    "red heart": {
        "en": "heart", "zh": "爱心", "ja": "ハート", "ko": "하트", "de": "herz", "fr": "cœur",
        "es": "corazón", "pt": "coração", "it": "cuore", "ru": "сердце",
    },
    "red lantern": {
        "en": "lantern", "zh": "灯笼", "ja": "提灯", "ko": "등", "de": "laterne", "fr": "lanterne",
        "es": "farolillo", "pt": "lanterna", "it": "lanterna", "ru": "фонарь",
    },
}  # fmt: skip

# A data set has a few hundred names, and a million captions of them.
_plural, _with_article = cache(plural), cache(with_article)


def prompt(
    subject: str,
    style: str | None,
    background: str = "white",
    language: str = "en",
    *,
    colour: str | None = None,
) -> str:
    """The canonical caption: "a red apple, 3d style, on a blue background"."""
    return composed("single", [subject], style, background, language, colours=(colour,))


def composed(
    kind: str,
    names: list[str],
    style: str | None,
    background: str = "white",
    language: str = "en",
    *,
    colours: Sequence[str | None] = (),
    extent: str | None = None,
    corners: tuple[int, ...] = (),
) -> str:
    """The canonical caption of a composed picture: "a cat left of a dog, flat style".

    `kind`, `colours` and `extent` as in `compose.Composition`, `corners` as in `compose.arrange`;
    `names` has a name for each subject, which is repeated for copies.
    """
    phrases = PHRASES[language]
    names = [
        _attributed(name, phrases, colour and phrases.adjectives[colour][0], extent, 0)
        for name, colour in zip(names, colours or [None] * len(names), strict=True)
    ]
    canonical = _templates(kind, names, language, corners)[0]
    what = _filled(canonical, names, language, names)
    return _with_background(_with_style(what, style, phrases), background, phrases)


def ways(kind: str, names: list[str], language: str, corners: tuple[int, ...] = ()) -> list[str]:
    """All ways to describe the subjects and their places, the canonical one first."""
    return [
        _filled(template, names, language, names)
        for template in _templates(kind, names, language, corners)
    ]


def variations(
    shown: Composition, names: list[dict[str, list[str]]], rng: random.Random
) -> list[str]:
    """12 to 24 different captions of a composed picture, or fewer if there are no more.

    `names` are, for each subject, the names in the manifest (language -> names). The canonical
    English caption comes first.
    """
    names = [_bare(of) if colour else of for of, colour in zip(names, shown.colours, strict=True)]
    canonical = composed(
        shown.kind, [each["en"][0] for each in names], shown.style, shown.background,
        colours=shown.colours, extent=shown.extent, corners=shown.corners,
    )  # fmt: skip
    captions = {canonical: None}
    wanted = rng.randint(LEAST, MOST)
    for _ in range(20 * wanted):
        if len(captions) == wanted:
            break
        captions[_variation(shown, names, rng)] = None
    return list(captions)


def _variation(shown: Composition, names: list[dict[str, list[str]]], rng: random.Random) -> str:
    plain = shown.kind in ("single", "count", "beside", "above") and not any(shown.colours)
    language = _language(tuple(names[0]), rng, plain)
    phrases = PHRASES[language]
    first = [each[language][0] for each in names]
    others = first
    if rng.random() < (KEYWORD if language == "en" else FOREIGN_KEYWORD):
        other = {name: rng.choice(each[language]) for name, each in zip(first, names, strict=True)}
        others = [other[name] for name in first]
        if shown.kind == "single" or any(shown.colours) or shown.extent:
            first = others
    forms = [colour and rng.choice(phrases.adjectives[colour]) for colour in shown.colours]
    turn = rng.randrange(12)
    first, others = (
        [
            _attributed(name, phrases, form, shown.extent, turn)
            for name, form in zip(of, forms, strict=True)
        ]
        for of in (first, others)
    )
    template = rng.choice(_templates(shown.kind, first, language, shown.corners))
    what = _filled(template, first, language, others, turn)
    style = None if rng.random() < UNSTYLED else shown.style
    # Nobody writes "an emoji of on the left a cat".
    begins = shown.kind not in ("beside", "above", "corners")
    led = begins and bool(phrases.leads) and rng.random() < LED
    if led:
        what = rng.choice(phrases.leads).format(what)
    background = shown.background
    if style and rng.random() > CANONICAL and phrases.in_styles:
        text = _styled(what, style, phrases, language, begins and not led, rng)
    else:
        text = _with_style(what, style, phrases)
    if language == "en" and background != "white" and rng.random() < 0.4:
        return text + rng.choice([" on {}", " on {} background", ", {} background"]).format(
            background
        )
    return _with_background(text, background, phrases)


def _styled(
    what: str, style: str, phrases: Phrases, language: str, first: bool, rng: random.Random
) -> str:
    """In another form than the canonical one; the style may come `first`."""
    forms = [phrases.in_styles[style], "{} " + phrases.styles[style]]
    if language == "en":
        forms += ["{} in " + style, "{}, " + style, "{} " + style]
        forms += [style + " {}", style + " style {}"]
    forms = [form for form in forms if first or form.startswith("{}")]
    return rng.choice(forms).format(what)


def _attributed(
    name: str, phrases: Phrases, adjective: str | None, extent: str | None, turn: int
) -> str:
    """ "apple" -> "small blue apple"; `turn` chooses among the words for small or big."""
    if adjective:
        name = phrases.attributed.format(adjective=adjective, name=name)
    if extent:
        forms = phrases.small if extent == "small" else phrases.big
        name = forms[turn % len(forms)].format(name)
    return name


def _bare(names: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those that say no colour, of the languages that have one."""
    bare = BARE.get(names["en"][0], {})
    kept = {
        language: [bare[language]]
        if language in bare
        else [name for name in of if not says_a_colour(name, language)]
        for language, of in names.items()
    }
    return {language: of for language, of in kept.items() if of} | {
        "en": kept["en"] or names["en"][:1]
    }


def says_a_colour(name: str, language: str) -> bool:
    """Whether a word of the name is a colour: "red rose", "синяя звезда"."""
    words = _colours(language)
    if language in ("zh", "ja", "ko"):
        return any(word in name for word in words)
    return not words.isdisjoint(name.replace("-", " ").split())


@cache
def _colours(language: str) -> frozenset[str]:
    """All forms of the adjectives; of those that are written together, what all forms share."""
    forms = [form for of in PHRASES[language].adjectives.values() for form in of]
    if language in ("zh", "ja"):
        forms = [form.removesuffix("色的").removesuffix("的").rstrip("いの色") for form in forms]
    return frozenset(forms)


def _templates(
    kind: str, names: list[str], language: str, corners: tuple[int, ...] = ()
) -> tuple[str, ...]:
    return _of_kind(kind, language, language == "en" and _plural(names[0]) is not None, corners)


@cache
def _of_kind(
    kind: str, language: str, has_plural: bool, corners: tuple[int, ...]
) -> tuple[str, ...]:
    phrases = PHRASES[language]
    if kind == "corners":
        here, there = (phrases.corners[corner] for corner in corners)
        return tuple(
            t.replace("{here}", here).replace("{there}", there) for t in phrases.corner_pairs
        )
    templates = getattr(phrases, "single" if kind in ("coloured", "sized") else kind)
    return tuple(t for t in templates if has_plural or "{plural}" not in t)


def _filled(template: str, names: list[str], language: str, plain: list[str], turn: int = 0) -> str:
    """`plain` are other names, which are used where no article or plural is needed; `turn` chooses
    among the words for a number."""
    number = PHRASES[language].numbers.get(len(names), ("",))
    return template.format(
        first=plain[0],
        second=plain[1 % len(plain)],
        third=plain[-1],
        a_first=_with_article(names[0]),
        a_second=_with_article(names[-1]),
        plural=_plural(names[0]) if language == "en" else None,
        number=number[turn % len(number)],
        digit=len(names),
    )


def _language(named: tuple[str, ...], rng: random.Random, plain: bool) -> str:
    known, cumulated = _known(named, plain)
    return rng.choices(known, cum_weights=cumulated)[0]


@cache
def _known(languages: tuple[str, ...], plain: bool) -> tuple[list[str], list[int]]:
    """Those with phrases, and their cumulated weights; all phrases unless `plain`."""
    known = [each for each in languages if each in PHRASES]
    known = [each for each in known if plain or PHRASES[each].adjectives]
    return known, list(accumulate(ENGLISH if each == "en" else 1 for each in known))


def _with_style(what: str, style: str | None, phrases: Phrases) -> str:
    return phrases.comma.join([what, phrases.styles[style]]) if style else what


def _with_background(text: str, background: str, phrases: Phrases) -> str:
    if background == "white":
        return text
    return phrases.comma.join([text, phrases.backgrounds[background]])
