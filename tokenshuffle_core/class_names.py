"""Prompts of a class-conditional model: the number of a class, or its name."""

import difflib
import json
from functools import cache
from pathlib import Path


class ClassNames:
    """The prompt encoder of a class-conditional model: a prompt is one token, the class, and no
    prompt is the class behind the last one, which the model learned for no class."""

    kind = "classes"

    def __init__(self, names: list[str]):
        self.names = names
        self.pad = len(names)
        self.known = {name.casefold(): i for i, name in reversed([*enumerate(names)])}

    @classmethod
    def from_json(cls, text: str) -> "ClassNames":
        """The inverse of `to_json`. Raises ValueError."""
        try:
            names = json.loads(text)["classes"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the stored class names cannot be read: {error}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the stored class names are not a list of names")
        return cls(names)

    def to_json(self) -> str:
        return json.dumps({"classes": self.names})

    def __len__(self) -> int:
        return len(self.names) + 1

    def encode(self, text: str) -> list[int]:
        """The class of a number, a name or the start of one name; none for no text.

        Raises ValueError, which names the classes that are meant perhaps.
        """
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
        if text in self.known:
            return [self.known[text]]
        starts = [name for name in self.known if name.startswith(text)]
        if len(starts) == 1:
            return [self.known[starts[0]]]
        near = starts or [name for name in self.known if text in name]
        near = near or difflib.get_close_matches(text, self.known, 5, 0.5)
        names = ", ".join(
            f"{self.names[self.known[name]]} ({self.known[name]})" for name in near[:5]
        )
        hint = f"did you mean {names}?" if near else "this model draws ImageNet's 1,000 classes"
        raise ValueError(f"{text!r} is not the name of a class that this model knows: {hint}")

    def frame(self, ids: list[int], rows: int, columns: int, length: int = 0) -> list[int]:
        """As TextTokenizer.frame: nothing surrounds a class."""
        return ids or [self.pad]


@cache
def imagenet() -> list[str]:
    """The names of the 1,000 classes of ILSVRC 2012, in their order."""
    file = Path(__file__).with_name("imagenet_classes.txt")
    return file.read_text(encoding="utf-8").splitlines()
