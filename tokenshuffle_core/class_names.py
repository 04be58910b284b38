"""Prompts of a class-conditional model: the number or the name of a class."""

import difflib
import json
from functools import cache
from pathlib import Path

MAX_NAME = 300  # characters


class ClassNames:
    """The prompt encoder of a class-conditional model: a prompt is one token, its class; the
    unconditional prompt is one more class after the last."""

    kind = "classes"

    def __init__(self, names: list[str]):
        self.names = names
        self.pad = len(names)
        self.numbers = {name.casefold(): i for i, name in reversed([*enumerate(names)])}

    @classmethod
    def from_json(cls, text: str) -> "ClassNames":
        """The inverse of `to_json`. Raises ValueError."""
        try:
            names = json.loads(text)["classes"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the stored class names cannot be read: {error}") from None
        if not isinstance(names, list) or not all(
            isinstance(name, str) and len(name) <= MAX_NAME for name in names
        ):
            raise ValueError(f"the class names are not texts of at most {MAX_NAME} characters")
        return cls(names)

    def to_json(self) -> str:
        return json.dumps({"classes": self.names})

    def __len__(self) -> int:
        return len(self.names) + 1

    def encode(self, text: str, negative: bool = False) -> list[int]:
        """The class with this number, this name or the only name that starts so; [] for "".

        Raises ValueError, which suggests similar names.
        """
        if len(text) > MAX_NAME:  # similar names of it would take long to find
            raise ValueError(f"the class has {len(text)} characters: give its number or its name")
        text = " ".join(text.split()).casefold()
        if not text:
            return []
        if text.isdecimal():
            if int(text) >= len(self.names):
                raise ValueError(
                    f"class {text} does not exist: this model has the classes 0 to "
                    f"{len(self.names) - 1}"
                )
            return [int(text)]
        if text in self.numbers:
            return [self.numbers[text]]
        starts = [name for name in self.numbers if name.startswith(text)]
        if len(starts) == 1:
            return [self.numbers[starts[0]]]
        near = starts or [name for name in self.numbers if text in name]
        near = near or difflib.get_close_matches(text, self.numbers, 5, 0.5)
        near = [self.numbers[name] for name in near[:5]]
        names = ", ".join(f"{self.names[number]} ({number})" for number in near)
        hint = f"did you mean {names}?" if near else "this model draws ImageNet's 1,000 classes"
        raise ValueError(f"{text!r} is not the name of a class of this model: {hint}")

    def cut(self, ids: list[int], longest: int) -> list[int]:
        """A class is one id."""
        return ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def frame(self, ids: list[int], *_, **__) -> list[int]:
        """As TextTokenizer.frame, without a template."""
        return ids or [self.pad]


@cache
def imagenet() -> list[str]:
    """The names of the 1,000 classes of ILSVRC 2012, in their order."""
    file = Path(__file__).with_name("imagenet_classes.txt")
    return file.read_text(encoding="utf-8").splitlines()
