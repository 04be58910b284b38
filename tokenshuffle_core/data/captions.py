"""What a source says of its pictures: captions, how often an epoch visits each, and its split."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short

from ..files import json_lines, json_object

METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = (".txt", ".caption")
COLUMNS = ("text", "caption", "captions", "prompt")
MOST = 10_000  # repeats
EXPECTED = 'a JSON object such as {"text": "a red apple"}'
# As `datasets` calls them, and the words by which it knows them in the name of a folder. It has
# three splits; a training here holds validation and test out alike.
SPLITS = {
    "train": ("train", "training"),
    "held-out": (
        *("validation", "valid", "val", "dev"), *("test", "testing", "eval", "evaluation"),
        "held-out",
    ),
}  # fmt: skip
BETWEEN = "[-._ 0-9]"  # characters around such a word


@dataclass(frozen=True)
class Fields:
    """What is said of a picture; without a `split`, its folder decides."""

    captions: tuple[str, ...] = ()
    repeats: int = 1
    split: str | None = None
    extra: dict = field(default_factory=dict)


def split_by_name(*folders: str) -> str:
    """The split of a picture in these folders, one within the other: held out if one is named so,
    such as "validation" or "test-01", by the rule of `datasets`."""
    words = "|".join(SPLITS["held-out"])
    pattern = re.compile(f"(^|.*{BETWEEN})({words})({BETWEEN}.*|$)", re.DOTALL)
    return "held-out" if any(map(pattern.fullmatch, folders)) else "train"


def lines(content: bytes, where: str | Path) -> tuple[str, ...]:
    """The captions of a text file, one per line, without the byte order mark of Notepad."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not text in UTF-8: save it as UTF-8") from None
    # Not splitlines(), which also splits at other characters, such as U+2028.
    found = (line.strip() for line in re.split("\r\n|\r|\n", text))
    return tuple(line for line in found if line)


def entries(path: Path) -> Iterator[tuple[str, Fields]]:
    """The place of each line of a metadata file, for messages, and what it says."""
    read = _csv(path) if path.suffix == ".csv" else json_lines(path, EXPECTED)
    for number, entry in read:
        where = f"{path}, line {number + 1}"
        yield where, _fields(entry, where)


def json_fields(content: bytes, where: str) -> Fields:
    """What one JSON object says."""
    return _fields(json_object(content, where, EXPECTED), where)


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a table as objects, without the fields that are empty, and the number of the last
    line of each, from 0."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            columns = table.fieldnames or []
            if "file_name" not in columns or len(set(columns)) < len(columns):
                raise ValueError(
                    f"{path}: the first line must name the columns, each once, and one file_name"
                )
            for row in table:
                if None in row:
                    raise ValueError(
                        f"{path}, line {table.line_num} has more fields than the first"
                    )
                entry = {name: value for name, value in row.items() if value}
                if re.fullmatch("[0-9]{1,9}", entry.get("repeats", "")):
                    entry["repeats"] = int(entry["repeats"])
                yield table.line_num - 1, entry
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, after line {table.line_num}: {error}") from None


def _fields(extra: dict, where: str) -> Fields:
    captions: list[str] = []
    for name in COLUMNS:
        texts = extra.pop(name, None)
        if texts is None or isinstance(texts, str):  # some write null for no caption
            texts = [texts or ""]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{where}: {name} must be a text or a list of texts, not {short(texts)}"
            )
        captions += [text.strip() for text in texts if text.strip()]
    repeats = extra.pop("repeats", 1)
    if type(repeats) is not int or not 1 <= repeats <= MOST:
        raise ValueError(
            f"{where}: repeats must be a whole number from 1 to {MOST}, not {short(repeats)}"
        )
    name = extra.pop("split", None)
    splits = [split for split, words in SPLITS.items() if name in words]
    if name is not None and not splits:
        known = ", ".join(word for words in SPLITS.values() for word in words)
        raise ValueError(f"{where}: split must be one of {known}, not {short(name)}")
    return Fields(tuple(captions), repeats, splits[0] if splits else None, extra)
