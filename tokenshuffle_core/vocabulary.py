"""What a model with a closed vocabulary knows, as data for interfaces: stored in its checkpoint."""

import json
import re
from dataclasses import asdict, dataclass, field, fields

MAX_BYTES = 4 * 2**20  # of the JSON, which comes from files that nobody checked
MAX_TEXT = 200  # characters of one name or phrase
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

Phrases = dict[str, dict[str, str]]  # what a caption may name -> language -> how it says so


@dataclass(frozen=True)
class Subject:
    """`names` has the names in each language, the best first, `styles` those that the subject was
    trained in; `recoloured` says whether it was trained in other colours than its own. `forms` are
    other forms of the names in prompts, such as plurals."""

    names: dict[str, tuple[str, ...]]
    styles: tuple[str, ...] = ()
    recoloured: bool = False
    forms: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        names = _by_language(self.names, "names")
        _require(names, "a subject must have names by language")
        _require(all(names.values()), "a subject must have a name in each of its languages")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "forms", _by_language(self.forms, "forms"))
        object.__setattr__(self, "styles", _texts(self.styles, "styles"))
        _require(type(self.recoloured) is bool, "recoloured must be true or false")


@dataclass(frozen=True)
class Vocabulary:
    """Subjects, and what a caption may add to them.

    `styles`, `backgrounds` and `colours` (of a thing itself) have a phrase in each language for
    each of their keys. `counts` are the numbers of copies that may be composed, `kinds` the kinds
    of composition: "single", "count", "beside", "above" and others of a data set. `words` are the
    other words of the captions, in each language; none if they are not known. Raises ValueError for
    values of other types.
    """

    subjects: tuple[Subject, ...]
    styles: Phrases = field(default_factory=dict)
    backgrounds: Phrases = field(default_factory=dict)
    colours: Phrases = field(default_factory=dict)
    counts: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        subjects, counts = _several(self.subjects, "subjects"), _several(self.counts, "counts")
        _require(
            subjects and all(isinstance(subject, Subject) for subject in subjects),
            "there must be subjects",
        )
        for name in ("styles", "backgrounds", "colours"):
            _check_phrases(getattr(self, name), name)
        for style in (style for subject in subjects for style in subject.styles):
            _require(style in self.styles, f"the style {style!a} of a subject has no phrases")
        _require(
            all(type(count) is int and 1 <= count <= 100 for count in counts),
            f"counts must be whole numbers from 1 to 100, not {counts!a:.80}",
        )
        object.__setattr__(self, "subjects", subjects)
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "kinds", _texts(self.kinds, "kinds"))
        object.__setattr__(self, "words", _by_language(self.words, "words"))

    @property
    def languages(self) -> tuple[str, ...]:
        """In which subjects have names, English first."""
        languages = dict.fromkeys(key for subject in self.subjects for key in subject.names)
        return tuple(sorted(languages, key=lambda language: language != "en"))

    def names(self, language: str | None = None, *, recoloured: bool = False) -> list[str]:
        """The best name of each subject, or of each that is `recoloured`, in alphabetical order;
        `language` is by default the first of `languages`. Raises ValueError for one without names.
        """
        language = language or self.languages[0]
        known = ", ".join(self.languages)
        _require(language in self.languages, f"the subjects have names in {known}, not {language}")
        subjects = [subject for subject in self.subjects if subject.recoloured or not recoloured]
        names = [subject.names[language][0] for subject in subjects if language in subject.names]
        return sorted(names, key=str.casefold)

    def example(self, language: str | None = None) -> str:
        """A prompt: the first subject that has a name in the language, in its first style."""
        language = language or self.languages[0]
        subject = next(each for each in self.subjects if language in each.names)
        styles = [self.styles[style].get(language) for style in subject.styles]
        return ", ".join([subject.names[language][0], *filter(None, styles[:1])])

    def find(self, name: str, language: str | None = None) -> Subject | None:
        """The subject with this name, in any language or only in one; capitals and spaces do not
        matter. Of several, the one of which it is a better name."""
        wanted = _plain(name)
        found = [
            (place, subject)
            for subject in self.subjects
            for key, names in subject.names.items()
            for place, each in enumerate(names)
            if language in (None, key) and _plain(each) == wanted
        ]
        return min(found, key=lambda pair: pair[0])[1] if found else None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Raises ValueError with one sentence for text that is not a vocabulary. Keys that a later
        version may add are left out."""
        try:
            _require(len(text.encode()) <= MAX_BYTES, f"it has more than {MAX_BYTES} bytes")
            parts = _fields(cls, json.loads(text))
            subjects = [Subject(**_fields(Subject, part)) for part in parts.pop("subjects")]
            return cls(tuple(subjects), **parts)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"the vocabulary cannot be read: {error}") from None


def _fields(kind: type, part: object) -> dict:
    if type(part) is not dict:
        raise ValueError(f"there must be an object, not {part!a:.80}")
    return {field.name: part[field.name] for field in fields(kind) if field.name in part}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _several(values: object, name: str) -> tuple:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} must be a list, not {values!a:.80}")
    return tuple(values)


def _by_language(values: object, name: str) -> dict[str, tuple[str, ...]]:
    _require(type(values) is dict, f"{name} must be texts by language, not {values!a:.80}")
    return {_text(key): _texts(each, name) for key, each in values.items()}


def _texts(values: object, name: str) -> tuple[str, ...]:
    return tuple(_text(value) for value in _several(values, name))


def _text(value: object) -> str:
    if type(value) is str and 0 < len(value) <= MAX_TEXT and not UNPRINTABLE.search(value):
        return value
    # Not by _require, whose message costs more than all checks of tens of thousands of names.
    raise ValueError(f"{value!a:.80} is not a line of 1 to {MAX_TEXT} characters")


def _check_phrases(table: object, name: str) -> None:
    _require(type(table) is dict, f"{name} must be an object, not {table!a:.80}")
    for key, phrases in table.items():
        _require(type(phrases) is dict, f"{name}: {_text(key)} must have phrases by language")
        for text in (key, *phrases, *phrases.values()):
            _text(text)
