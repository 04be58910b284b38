"""Pictures with captions: a folder with .txt files, an image folder of `datasets`, or .tar shards.

Nothing is unpacked, and a picture is decoded only when it is used: an `Item` stores where the bytes
of its picture are, in a file or within a .tar.
"""

import os
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path, PurePath, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from ..files import json_lines, json_object

EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff")  # not read
FORMATS = ("JPEG", "PNG", "WEBP")  # not all of Pillow's: some start other programs
SPLITS = ("train", "held-out")
METADATA = "metadata.jsonl"
EXPECTED = 'a JSON object such as {"text": "a red apple"}'


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

    def picture(self, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
        """The picture in RGB, upright; a transparent one is put on `background`.

        Raises ValueError for a picture that is not a JPEG, PNG or WebP with 8 bits per channel, is
        damaged, or is a decompression bomb; OSError where the file cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        try:
            image = Image.open(BytesIO(content), formats=FORMATS)
            image.load()
            image = ImageOps.exif_transpose(image)
        except UnidentifiedImageError:  # its message contains a memory address
            raise ValueError(f"picture {self.key} is not a JPEG, PNG or WebP") from None
        except Exception as error:  # Pillow's parsers raise anything, such as struct.error
            raise ValueError(f"picture {self.key} cannot be read: {error}") from None
        if image.mode.startswith("I") or image.mode == "F":
            raise ValueError(
                f"picture {self.key} has more than 8 bits per channel: convert it to 8 bits"
            )
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, (*background, 255))
            image = Image.alpha_composite(behind, image)
        return image.convert("RGB")


def read_items(source: str | Path, captioned: bool = True) -> list[Item]:
    """The items of `source`, sorted by key. It is one of

    - a folder with a `metadata.jsonl` that lists its pictures (image folder of `datasets`),
    - a .tar file, or a folder of them (WebDataset shards), without compression,
    - a folder of pictures, each with a .txt file of the same name that has a caption per line.
      Subfolders are included, but not links to folders or hidden names.

    Raises FileNotFoundError where it does not exist, ValueError with one sentence where it is none
    of these, a picture has no caption (unless `captioned` is false), two have the same key, or a
    field is wrong.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_file():
        if source.suffix.lower() != ".tar":
            raise ValueError(
                f"{source} is neither a folder nor a .tar file: expected a folder of pictures with "
                f".txt captions, a folder with a {METADATA}, or WebDataset shards (.tar)"
            )
        items = _in_tar(source)
    elif (source / METADATA).is_file():
        items = _in_metadata(source)
    else:
        items = _in_folder(source)
        shards = [path for path in source.glob("*.tar") if path.name[0] != "."]
        if items and shards:
            raise ValueError(
                f"{source} has both pictures and .tar shards: put them into separate folders"
            )
        for shard in shards:
            items += _in_tar(shard)
        if shards and len({item.key for item in items}) < len(items):  # each numbers them from 0
            items = [replace(item, key=f"{item.path.stem}/{item.key}") for item in items]
        if below := next(source.glob(f"*/{METADATA}"), None):
            raise ValueError(f"{below} lists the pictures of {below.parent}: give that folder")
    if not items:
        raise ValueError(
            f"{source} has no pictures ({', '.join(EXTENSIONS)}), no .tar shards with pictures "
            f"and no {METADATA}"
        )
    items.sort(key=lambda item: item.key)
    for first, second in pairwise(items):
        if first.key == second.key:
            raise ValueError(
                f"{source} has two pictures with the key {first.key!r}, in {first.path} and "
                f"{second.path}: rename one of them"
            )
    if captioned and (bare := [item for item in items if not item.captions]):
        where = f'the field "text" of {METADATA}'
        if not (source / METADATA).is_file():
            place = ".tar" if bare[0].path.suffix == ".tar" else "folder"
            where = f"a .txt file of the same name in the same {place}"
        raise ValueError(
            f"{len(bare)} of the {len(items)} pictures in {source} have no caption, the first is "
            f"{bare[0].key!r}: write one into {where}"
        )
    return items


def _in_folder(folder: Path) -> list[Item]:
    items, others = [], Counter()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            path = Path(parent, name)
            if name[0] == "." or path.suffix[1:].lower() not in EXTENSIONS:
                others.update({path.suffix.lower()}.intersection(OTHERS))
                continue
            text = path.with_suffix(".txt")
            captions = _lines(text.read_bytes(), text) if text.is_file() else ()
            items.append(_in_file(path, _key(path.relative_to(folder).as_posix()), captions))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        print(f"note: left out, because they are not JPEG, PNG or WebP: {kinds}", file=sys.stderr)
    return items


def _in_metadata(folder: Path) -> list[Item]:
    items = []
    path = folder / METADATA
    root = folder.resolve()
    for number, entry in json_lines(path, EXPECTED):
        where = f"{path}, line {number + 1}"
        fields = _fields(entry, where)
        name = fields["extra"].pop("file_name", None)
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{where}: file_name must be the name of a picture, not {name!r}")
        picture = folder / name
        if ".." in PurePath(name).parts or not picture.resolve().is_relative_to(root):
            raise ValueError(
                f"{where}: file_name {name!r} is outside {folder}: move the picture into it"
            )
        if not picture.is_file():
            raise ValueError(f"{where}: file_name {name!r} is not a file in {folder}")
        items.append(_in_file(picture, _key(name), **fields))
    return items


def _in_file(path: Path, key: str, captions: tuple[str, ...], **fields) -> Item:
    status = path.stat()
    return Item(key, captions, path, 0, status.st_size, status.st_mtime_ns, **fields)


def _in_tar(path: Path) -> list[Item]:
    """The samples of one shard, without those that have no picture, such as a stray .txt."""
    modified = path.stat().st_mtime_ns
    samples: dict[str, dict] = defaultdict(dict)  # key -> picture, txt, json
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, _, extension = name.name.partition(".")
                extension = extension.lower()
                if member.isdir() or not stem or extension not in (*EXTENSIONS, "txt", "json"):
                    continue
                where = f"{path}: {member.name}"
                if not member.isreg():
                    raise ValueError(f"{where} is a link, not a file: store the file itself")
                key = str(name.with_name(stem))
                kind = "picture" if extension in EXTENSIONS else extension
                if kind in samples[key]:
                    raise ValueError(
                        f"{where} is the second {kind} with the key {key!r}: rename it"
                    )
                if kind == "picture":
                    samples[key][kind] = member.offset_data, member.size
                else:
                    content = tar.extractfile(member).read()
                    samples[key][kind] = (
                        _lines(content, where)
                        if kind == "txt"
                        else _fields(json_object(content, where, EXPECTED), where)
                    )
            # tarfile mistakes a damaged header for the end of the archive.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged after {tar.offset} bytes")
    except (tarfile.TarError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable .tar without compression: {error}") from None
    items = []
    for key, sample in samples.items():
        if "picture" in sample:
            more = {"captions": ()} | sample.get("json", {})
            if "txt" in sample:
                more["captions"] = sample["txt"]
            offset, size = sample["picture"]
            items.append(Item(key, path=path, offset=offset, size=size, modified=modified, **more))
    return items


def _key(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _lines(content: bytes, where: str | Path) -> tuple[str, ...]:
    """The captions of a .txt file, one per line, without the byte order mark of Notepad."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not text in UTF-8: save it as UTF-8") from None
    return tuple(line.strip() for line in lines if line.strip())


def _fields(extra: dict, where: str) -> dict:
    """captions, repeats, split and extra from one JSON object, which becomes the last of them."""
    captions: list[str] = []
    for name in ("text", "caption", "captions"):
        texts = extra.pop(name, None)
        if texts is None or isinstance(texts, str):  # some write null for no caption
            texts = [texts or ""]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: {name} must be a text or a list of texts, not {texts!r}")
        captions += [text.strip() for text in texts if text.strip()]
    repeats = extra.pop("repeats", 1)
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"{where}: repeats must be a whole number of at least 1, not {repeats!r}")
    split = extra.pop("split", "train")
    if split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, not {split!r}")
    return {"captions": tuple(captions), "repeats": repeats, "split": split, "extra": extra}
