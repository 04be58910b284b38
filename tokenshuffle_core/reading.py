"""What a model with a closed vocabulary recognises in a prompt, and what it does not know."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from .vocabulary import Subject, Vocabulary

# A run of letters or digits, or a single character of the scripts that are written without spaces,
# of Korean, whose nouns have their particles at their ends, and of pictures.
ALONE = "\u2190-\u2bff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U0001f000-\U0001faff"
UNIT = re.compile(rf"[{ALONE}]|(?:(?![{ALONE}])[\w'-])+")
SIMILAR = 0.82  # least similarity of a name that is suggested, from 0 to 1
SPELT = 4  # words of an unknown phrase that are looked up on their own: each takes milliseconds


@dataclass(frozen=True)
class Reading:
    """`subjects` are the names of those found, in the order of the prompt, `others` its other
    phrases that have a key: styles, backgrounds and colours. `unknown` are the words that the
    captions never had, each with the most similar name, or "" if none is similar."""

    subjects: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()

    def unknown_words(self) -> str:
        """Such as '"paris", "helicoptr" (near: helicopter)'."""
        return ", ".join(
            f'"{word}"' + (f" (near: {near})" if near else "") for word, near in self.unknown
        )


class Reader:
    """Reads prompts with a vocabulary. `normalise` is what the text tokenizer does to a text, so
    that what is the same to the model is the same here."""

    def __init__(self, vocabulary: Vocabulary, normalise: Callable[[str], str]):
        self.normalise = normalise
        self.knows_words = bool(vocabulary.words)
        self.subjects: dict[str, list[tuple[str, int, Subject]]] = {}  # language, place, subject
        self.others: dict[str, list[str]] = {}  # phrase -> languages
        self.words: dict[str, list[str]] = {str(count): [] for count in vocabulary.counts}
        for subject in vocabulary.subjects:
            for language, names in subject.names.items():
                named = [*names, *subject.forms.get(language, ())]
                for place, name in enumerate(named):
                    self._add(self.subjects, name, (language, place, subject))
        for phrases in (vocabulary.colours, vocabulary.backgrounds, vocabulary.styles):
            for key, of in phrases.items():
                self.others.setdefault(key, [])  # "3d" for "3d style"
                for language, phrase in of.items():
                    self._add(self.others, phrase, language)
        for language, words in vocabulary.words.items():
            for word in words:
                self._add(self.words, word, language)
        phrases = {*self.subjects, *self.others, *self.words} - {""}
        self.longest: dict[str, list[str]] = {}  # first unit -> phrases, the longest first
        for phrase in sorted(phrases, key=len, reverse=True):
            units = UNIT.findall(phrase)
            if units:
                self.longest.setdefault(units[0], []).append(phrase)

    def _add(self, to: dict[str, list], phrase: str, value) -> None:
        to.setdefault(self.normalise(phrase).strip(), []).append(value)

    def read(self, prompt: str, language: str | None = None) -> Reading:
        """What is recognised; the subjects' names are in `language` where they have one in it."""
        text = self.normalise(prompt)
        parts = list(self._parts(text))
        found = [phrase for phrase, known in parts if known]
        unknown = dict.fromkeys(phrase for phrase, known in parts if not known)
        if not self.knows_words:
            unknown = {}
        likely = self._language(found)
        subjects = [
            min(self.subjects[p], key=lambda each: (each[0] != likely, each[1]))[2]
            for p in found
            if p in self.subjects
        ]
        names = [each.names.get(language) or next(iter(each.names.values())) for each in subjects]
        return Reading(
            tuple(dict.fromkeys(of[0] for of in names)),
            tuple(dict.fromkeys(p for p in found if p in self.others and p not in self.subjects)),
            tuple((word, self._near(word, (likely, language, "en"))) for word in unknown),
        )

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The longest known phrases, and between them what is unknown, words together."""
        place, start, end = 0, None, 0  # of what is unknown
        while unit := UNIT.search(text, place):
            phrase = next(
                (p for p in self.longest.get(unit[0], ()) if self._is_at(text, unit.start(), p)), ""
            )
            if phrase or (start is not None and re.search(r"[,;:.!?]", text[end : unit.start()])):
                if start is not None:
                    yield text[start:end], False
                start = None
            if phrase:
                yield phrase, True
                place = unit.start() + len(phrase)
            else:
                start = unit.start() if start is None else start
                place = end = unit.end()
        if start is not None:
            yield text[start:end], False

    @staticmethod
    def _is_at(text: str, start: int, phrase: str) -> bool:
        """Whether the phrase is there, up to the end of a unit."""
        end = start + len(phrase)
        if not text.startswith(phrase, start):
            return False
        inside = UNIT.match(text, end - 1)
        return not inside or inside.end() == end

    def _language(self, found: list[str]) -> str:
        """The one in which most was said; a lesser name of a subject says less."""
        said: Counter[str] = Counter()
        for phrase in found:
            for language, place, _ in self.subjects.get(phrase, ()):
                said[language] += 1 / (1 + place)
            said.update(self.others.get(phrase, []) + self.words.get(phrase, []))
        return max(said, key=said.get, default="")

    def _near(self, word: str, languages: tuple[str | None, ...]) -> str:
        """The most similar name of these languages, or if there is none, of any: to all that is
        unknown there, or to one of its words."""
        of_these = [
            name
            for name, of in self.subjects.items()
            if any(language in languages for language, *_ in of)
        ]
        near = (
            get_close_matches(part, names, 1, SIMILAR)
            for names in (of_these, self.subjects)
            for part in (word, *word.split()[:SPELT])
        )
        return next((names[0] for names in near if names), "")
