"""The vocabulary of the emoji data set, for the checkpoints of models that are trained on it."""

from collections.abc import Sequence

from ...vocabulary import Subject, Vocabulary
from .compose import COUNTS
from .phrases import PHRASES
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
        subjects.append(Subject(names, styles, any(record["tone"] for record in trained)))
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
    )
