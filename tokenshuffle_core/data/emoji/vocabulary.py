"""The vocabulary of the emoji data set, for the checkpoints of models that are trained on it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from ...vocabulary import Subject, Vocabulary
from .captions import BARE
from .compose import COUNTS
from .english import plural
from .phrases import PHRASES, Phrases
from .plan import KINDS


def vocabulary_of(records: Sequence[dict]) -> Vocabulary:
    """What a model knows that was trained on compositions of the `records` of the manifest, as
    `plan.plan` makes them. A style in which a subject is held out is not one of its styles."""
    by_subject: dict[str, list[dict]] = {}
    for record in records:
        by_subject.setdefault(record["subject"], []).append(record)
    subjects = []
    for of_one in by_subject.values():
        names = {language: tuple(names) for language, names in of_one[0]["names"].items()}
        trained = [record for record in of_one if record["split"] == "train"]
        styles = tuple(record["style"] for record in trained)
        recoloured = any(record["tone"] for record in trained)
        subjects.append(Subject(names, styles, recoloured, _forms(names)))
    phrases = {each: PHRASES[each] for each in records[0]["names"] if each in PHRASES}
    styles = dict.fromkeys(record["style"] for record in records)
    colours = next(iter(phrases.values())).backgrounds
    return Vocabulary(
        tuple(subjects),
        styles={style: {key: of.styles[style] for key, of in phrases.items()} for style in styles},
        backgrounds={
            colour: {key: of.backgrounds[colour] for key, of in phrases.items()}
            for colour in colours
        },
        colours={
            colour: {key: of.adjectives[colour][0] for key, of in phrases.items() if of.adjectives}
            for colour in colours
        },
        counts=COUNTS,
        kinds=tuple(dict.fromkeys(KINDS)),
        words={
            key: tuple(sorted({*_words(asdict(of)), *_after(of)})) for key, of in phrases.items()
        },
    )


def _forms(names: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """English plurals, and names without the colour that they say."""
    forms = {language: [bare] for language, bare in BARE.get(names["en"][0], {}).items()}
    english = (*names["en"], *forms.get("en", ()))
    forms["en"] = [*forms.get("en", ()), *filter(None, map(plural, english))]
    return {language: tuple(of) for language, of in forms.items() if of}


def _words(phrases: dict | tuple | str) -> Iterator[str]:
    """What the phrases say beside the names that they are filled with."""
    if isinstance(phrases, str):
        # Of Chinese and Japanese, what is written together.
        for part in re.split(r"(?:\{\w*\}|[^\w'-])+", phrases):
            if part:
                yield part
    else:
        for part in phrases.values() if isinstance(phrases, dict) else phrases:
            yield from _words(part)


def _after(phrases: Phrases) -> Iterator[str]:
    """What a form of the style says beside the style itself: a Korean particle."""
    for style, form in phrases.in_styles.items():
        yield from _words(form.replace(phrases.styles[style], ""))
