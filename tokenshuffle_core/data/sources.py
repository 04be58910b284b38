"""Pictures with captions: a folder with text files, an image folder of `datasets`, or .tar shards.

Nothing is unpacked, and a picture is decoded only when it is used: an `Item` stores where the bytes
of its picture are, in a file or within a .tar. What is found and not used is counted by reason.
"""

import os
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path, PurePath, PurePosixPath

from PIL import Image

from ..images import Colour, open_picture, to_rgb
from .captions import METADATA, TEXTS, Fields, entries, json_fields, lines, split_by_name

PICTURES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LONGEST = 2**20  # bytes of a text file or of a JSON file in a .tar


@dataclass(frozen=True)
class Item:
    """A picture with its captions. `key` is its name in the source, without the extension.

    An epoch visits it `repeats` times. The `size` bytes of the picture start at `offset` in `path`,
    which was last `modified` at that time (ns since 1970).
    """

    key: str
    captions: tuple[str, ...]
    path: Path
    offset: int
    size: int
    modified: int
    repeats: int = 1
    split: str = "train"
    extra: dict = field(default_factory=dict)

    def picture(self, background: Colour = (255, 255, 255)) -> Image.Image:
        """The picture in RGB, upright; a transparent one is put on `background`.

        Raises ValueError as `images.open_picture`; OSError where the file cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = BytesIO(file.read(self.size))
        what = f"picture {self.key}"
        return to_rgb(open_picture(content, what), what, background)


class LeftOut(defaultdict):
    """Reason -> the names of what is left out for it."""

    def __init__(self):
        super().__init__(list)

    def __str__(self) -> str:
        total = sum(map(len, self.values()))
        parts = [f"{len(names)} {reason} ({names[0]})" for reason, names in self.items()]
        return f"{total} left out: {', '.join(parts)}"


def read_items(source: str | Path, captioned: bool = True) -> list[Item]:
    """The items of `source`, sorted by key. It is one of

    - a folder with a metadata.jsonl or metadata.csv that lists its pictures, or with such folders
      in it (image folder of `datasets`),
    - a .tar file, or a folder of them (WebDataset shards), without compression,
    - a folder of pictures, each with a .txt or .caption file of the same name that has a caption
      per line. Subfolders are included, but not links to folders.

    The pictures in a folder, or a .tar, that is named for it, such as test or validation, are held
    out. Hidden names are not looked at. What else is found and not used, among it pictures without
    a caption if they must be `captioned`, is counted on standard error.

    Raises FileNotFoundError where it does not exist, ValueError with one sentence where it is none
    of these, none of its pictures can be used, two have the same key, or a field is wrong.
    """
    source, left_out = Path(source), LeftOut()
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_dir():
        items = _in_folder(source, left_out)
    elif source.is_file() and source.suffix.lower() == ".tar":
        items = _in_tar(source, PurePosixPath(), left_out)
    else:
        raise ValueError(
            f"{source} is neither a folder nor a .tar file: expected a folder of pictures with "
            f".txt captions, a folder with a {METADATA[0]}, or WebDataset shards (.tar)"
        )
    if not items:
        raise ValueError(
            f"{source} has no pictures ({', '.join(e[1:] for e in PICTURES)}), no .tar shards with "
            f"pictures and no {METADATA[0]}" + (f"; {left_out}" if left_out else "")
        )
    items.sort(key=lambda item: item.key)
    for first, second in pairwise(items):
        if first.key == second.key:
            raise ValueError(
                f"{source} has two pictures with the key {first.key!r}, in {first.path} and "
                f"{second.path}: rename one of them"
            )
    if captioned:
        bare = [item.key for item in items if not item.captions]
        items = [item for item in items if item.captions]
        if not items:
            raise ValueError(
                f"none of the {len(bare)} pictures in {source} has a caption, the first is "
                f"{bare[0]!r}: write one into a .txt file of the same name beside it, or into the "
                f'field "text" of {METADATA[0]}'
            )
        if bare:
            left_out["without a caption"] = bare
    _report(items, left_out)
    return items


def _report(items: list[Item], left_out: LeftOut) -> None:
    """Says what is left out, and what is held out for the name of its folder or its .tar alone."""
    held_out = 0
    for item in items:
        if item.split != "train":
            shard = [item.path.stem] if item.offset else []
            held_out += split_by_name(*PurePath(item.key).parts[:-1], *shard) != "train"
    if (left_out or held_out) and os.environ.get("RANK", "0") == "0":  # of the processes, one
        parts = [f"{len(items)} picture{'s' * (len(items) != 1)}"]
        if held_out:
            parts.append(f"{held_out} of them held out")
        print(", ".join([*parts, *([str(left_out)] if left_out else [])]), file=sys.stderr)


def _in_folder(folder: Path, left_out: LeftOut) -> list[Item]:
    """The items of its files. Each file is used, or in `left_out`."""
    found = _walk(folder)
    usable = {path for path, problem in found.items() if not problem}
    if metadata := sorted(path for path in usable if path.name in METADATA):
        items, used = _in_metadata(folder, metadata, found)
        unnamed = f"not named in {metadata[0].name}"
    else:
        items, used = _beside_texts(folder, usable)
        shards = sorted(path for path in usable if path.suffix.lower() == ".tar")
        if items and shards:
            raise ValueError(
                f"{folder} has both pictures and .tar shards: put them into separate folders"
            )
        if parquet := next((path for path in usable if path.name == "metadata.parquet"), None):
            raise ValueError(f"{parquet} cannot be read: save it as {' or '.join(METADATA)}")
        items += _in_shards(folder, shards, left_out)
        used |= dict.fromkeys(shards, "")
    for path, problem in (found | used).items():
        suffix = path.suffix.lower()
        if path not in used and not problem:
            problem = unnamed if suffix in PICTURES else "not a picture"
            if suffix in TEXTS and not metadata:
                problem = "text without a picture"
        if problem:
            left_out[problem].append(path.relative_to(folder).as_posix())
    return items


def _walk(folder: Path) -> dict[Path, str]:
    """The files of a folder, and what is wrong with each, "" where it can be read."""
    found = {}

    def unreadable(error: OSError) -> None:
        found[Path(error.filename)] = "unreadable"

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted({*names, *links}):
            path = Path(parent, name)
            if name[0] == ".":
                continue
            if name in links:
                found[path] = "link to a folder"
            elif not path.exists():
                found[path] = "broken link"
            elif not path.is_file():
                found[path] = "not a file"
            else:
                found[path] = "" if os.access(path, os.R_OK) else "unreadable"
    return found


def _beside_texts(folder: Path, usable: set[Path]) -> tuple[list[Item], dict[Path, str]]:
    """Pictures with their captions in files of the same name, and the files that are used."""
    texts = defaultdict(list)
    for path in sorted(usable):
        if path.suffix.lower() in TEXTS:
            texts[path.with_suffix("")].append(path)
    items, used = [], {}
    for path in usable:
        if path.suffix.lower() in PICTURES:
            own = texts.get(path.with_suffix(""), [])
            used |= dict.fromkeys([path, *own], "")
            captions = tuple(line for text in own for line in lines(_read(text), text))
            items.append(_in_file(path, path.relative_to(folder), Fields(captions)))
    return items, used


def _read(text: Path) -> bytes:
    if text.stat().st_size > LONGEST:
        raise ValueError(f"{text} is larger than {LONGEST} bytes: it is no caption")
    return text.read_bytes()


def _in_metadata(
    folder: Path, metadata: list[Path], found: dict[Path, str]
) -> tuple[list[Item], dict[Path, str]]:
    """The pictures that these files of `folder` name, and the files that are used or missing."""
    if len({path.suffix for path in metadata}) > 1:
        raise ValueError(
            f"{folder} has both {' and '.join(METADATA)}: keep one kind, as `datasets` demands"
        )
    items, root = [], folder.resolve()
    used = dict.fromkeys(metadata, "")
    for listing in metadata:
        for where, fields in entries(listing):
            name = fields.extra.pop("file_name", None)
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError(f"{where}: file_name must be the name of a picture, not {name!r}")
            path = listing.parent / name
            used[path] = found.get(path, "")
            if used[path]:
                continue
            if ".." in PurePath(name).parts or not path.resolve().is_relative_to(root):
                raise ValueError(
                    f"{where}: file_name {name!r} is outside {folder}: move the picture into it"
                )
            if not path.is_file():
                used[path] = f"missing, but named in {listing.name}"
            else:
                items.append(_in_file(path, path.relative_to(folder), fields))
    return items, used


def _in_file(path: Path, name: PurePath, fields: Fields) -> Item:
    status = path.stat()
    place = path, 0, status.st_size, status.st_mtime_ns
    return _item(PurePosixPath(name.as_posix()), fields, *place)


def _item(name: PurePosixPath, fields: Fields, *place, shard: PurePosixPath | None = None) -> Item:
    """`name` is that of the picture in the source, or in the `shard` of the source."""
    split = fields.split or split_by_name(*name.parts[:-1], *(shard.parts if shard else ()))
    key = str(name.with_suffix(""))
    return Item(key, fields.captions, *place, fields.repeats, split, fields.extra)


def _in_shards(folder: Path, shards: list[Path], left_out: LeftOut) -> list[Item]:
    of_shard = {
        path: _in_tar(path, PurePosixPath(path.relative_to(folder).as_posix()), left_out)
        for path in shards
    }
    items = [item for of_one in of_shard.values() for item in of_one]
    if len({item.key for item in items}) < len(items):  # each numbers its samples from 0
        names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in shards}
        items = [replace(item, key=f"{names[item.path]}/{item.key}") for item in items]
    return items


def _in_tar(path: Path, shard: PurePosixPath, left_out: LeftOut) -> list[Item]:
    """The samples of one shard, whose name in the source, if that is a folder, is `shard`. A key is
    what its members' names have in common, up to the last dot."""
    modified = path.stat().st_mtime_ns
    samples: dict[str, dict] = defaultdict(dict)  # key -> picture, .txt, .caption, .json
    names: dict[str, PurePosixPath] = {}
    for tar, member in _members(path):
        name = PurePosixPath(member.name)
        if member.isdir() or name.name[:1] in ("", "."):
            continue
        kind = name.suffix.lower()
        where = f"{path}: {member.name}"
        if problem := _problem(member, kind):
            left_out[problem].append(where)
            continue
        kind = "picture" if kind in PICTURES else kind
        key = str(name.with_suffix(""))
        if kind in samples[key]:
            raise ValueError(f"{where} is the second {kind} with the key {key!r}: rename it")
        if kind == "picture":
            names[key] = name
            samples[key][kind] = member.offset_data, member.size
        elif member.size > LONGEST:
            raise ValueError(f"{where} is larger than {LONGEST} bytes: it is no caption")
        else:
            try:
                content = tar.extractfile(member).read(LONGEST)
            except tarfile.TarError as error:
                raise ValueError(f"{where} cannot be read: {error}") from None
            samples[key][kind] = (json_fields if kind == ".json" else lines)(content, where)
    items = []
    for key, sample in samples.items():
        texts = [line for kind in TEXTS for line in sample.get(kind, ())]
        first = PurePosixPath(key)
        first = str(first.with_name(first.name.partition(".")[0] or first.name))
        if "picture" not in sample:
            left_out["text without a picture"].append(f"{path}: {key}{next(iter(sample))}")
        elif len(sample) == 1 and first != key and "picture" in samples.get(first, ()):
            left_out["further picture of a sample"].append(f"{path}: {names[key]}")
        else:
            fields = sample.get(".json", Fields())
            if texts:
                fields = replace(fields, captions=tuple(texts))
            place = path, *sample["picture"], modified
            items.append(_item(names[key], fields, *place, shard=shard))
    return items


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """A .tar and each of its members. Raises ValueError where it is damaged, which `tarfile` may
    take for its end, or follow in a circle."""
    try:
        with tarfile.open(path, "r:") as tar:
            end = -1
            for member in tar:
                if tar.offset <= end:
                    raise tarfile.ReadError(f"damaged after {end} bytes")
                end = tar.offset
                yield tar, member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged after {tar.offset} bytes")
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        reason = str(error) or "damaged"
        raise ValueError(f"{path} is not a readable .tar without compression: {reason}") from None


def _problem(member: tarfile.TarInfo, kind: str) -> str:
    """Why a member of a .tar is not used; "" if it may be."""
    if kind not in (*PICTURES, *TEXTS, ".json"):
        return "not a picture"
    if member.issym() or member.islnk():
        return "link"
    return "" if member.isreg() and not member.issparse() else "not a file"
