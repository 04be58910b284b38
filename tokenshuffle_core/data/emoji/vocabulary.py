"""The vocabulary of the emoji data set, for the checkpoints of models that are trained on it."""

from collections.abc import Collection, Mapping, Sequence

from ...vocabulary import Phrases as Table
from ...vocabulary import Subject, Vocabulary
from .phrases import Phrases


def vocabulary_of(
    records: Sequence[dict],
    phrases: Mapping[str, Phrases],
    *,
    recoloured: Collection[str] = (),
    colours: Table | None = None,
    counts: Sequence[int] = (),
    kinds: Sequence[str] = ("single",),
) -> Vocabulary:
    """What a model knows that was trained on the `records` of the manifest, with captions from
    `phrases` (of each language).

    `recoloured` are the subjects that it has seen in `colours`: name -> language -> phrase.
    `counts` and `kinds` are those of the compositions. A style in which a subject is held out is
    not one of its styles.
    """
    by_subject: dict[str, list[dict]] = {}
    for record in records:
        by_subject.setdefault(record["subject"], []).append(record)
    subjects = tuple(
        Subject(
            {language: tuple(names) for language, names in of_one[0]["names"].items()},
            tuple(record["style"] for record in of_one if record["split"] == "train"),
            subject in recoloured,
        )
        for subject, of_one in by_subject.items()
    )
    languages = [language for language in records[0]["names"] if language in phrases]
    return Vocabulary(
        subjects,
        styles={
            style: {language: phrases[language].styles[style] for language in languages}
            for style in dict.fromkeys(record["style"] for record in records)
        },
        backgrounds={
            name: {language: phrases[language].backgrounds[name] for language in languages}
            for name in phrases[languages[0]].backgrounds
        },
        colours=colours or {},
        counts=tuple(counts),
        kinds=tuple(kinds),
    )
