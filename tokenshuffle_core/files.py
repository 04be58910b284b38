"""Text, JSON lines, checksums, and writing files so that a crash, a full disk or Ctrl-C leaves no
partial file."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

RESERVED = ("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$")  # names of devices in Windows
PART = ".part"
# Characters of a file's name in that of its temporary file: with four bytes each, it fits.
PREFIX = 60


def target_of(path: str | Path) -> Path:
    """Where a file `path` is to be written: a link is followed, also to a file not yet there.

    Raises FileNotFoundError, which names the folder, if that does not exist; ValueError for what is
    there and not a file; OSError for a folder that may not be written to and a name that the system
    does not take.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"the folder {target.parent} does not exist, so {path.name} cannot be saved"
        )
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target.parent))
    try:
        kind = os.stat(target).st_mode
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
        raise ValueError(f"{path} is {what}, not a file: choose another name")
    return target


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds. Where
    `path` is a link, it stays one, and what it points to is written. Raises as `target_of`."""
    target = target_of(path)
    handle, name = tempfile.mkstemp(PART, _prefix(target), target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; this one gets the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _prefix(target: Path) -> str:
    return f".{target.name[:PREFIX]}."


def remove_leftovers(targets: Iterable[Path]) -> None:
    """Remove what a killed process has left of writing these files (see `target_of`).
    No other process may be writing them."""
    prefixes = {(target.parent, _prefix(target)) for target in targets}
    for folder in {folder for folder, _ in prefixes}:
        for path in folder.glob(f".*{PART}"):
            if (folder, path.name[: -len(PART)].rpartition(".")[0] + ".") in prefixes:
                path.unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Raises ValueError for a file's name that is a path, or that some system does not take."""
    stem = name.partition(".")[0].rstrip().upper()
    if not name or len(name.encode("utf-8", "replace")) > 255:
        reason = "must have 1 to 255 bytes"
    elif found := [c for c in name if c in '<>:"/\\|?*' or ord(c) < 32]:
        reason = f"must not contain {found[0]!r}"
    elif stem in RESERVED or re.fullmatch("(COM|LPT)[0-9¹²³]", stem):
        reason = f"must not be {stem}, which Windows reserves"
    elif name.endswith((" ", ".")):
        reason = "must not end in a space or a dot"
    else:
        return
    raise ValueError(f"the name of a file {reason}: {name[:60]!r}")


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Raises as `atomic_path`, and OSError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Without a byte order mark. Raises FileNotFoundError, or ValueError for text that is not in
    UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: save it as UTF-8") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not blank, without white space around them, and the number of
    each, from 0. Raises as `read_text`."""
    # Not splitlines, which also splits at characters that a line of JSON or a prompt may contain.
    for number, line in enumerate(read_text(path).split("\n")):
        if line := line.strip():
            yield number, line


def json_lines(path: Path, expected: str) -> Iterator[tuple[int, dict]]:
    """As `text_lines`, with a JSON object in each line: `expected` says in an error what object.
    Raises also ValueError, which names the line."""
    for number, line in text_lines(path):
        yield number, json_object(line, f"{path}, line {number + 1}", expected)


def json_object(content: str | bytes, where: str, expected: str) -> dict:
    """Raises ValueError, which begins with `where`, for what is not a JSON object in UTF-8 and for
    text in it that is not, such as half of a surrogate pair."""
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        found = json.loads(content)
        if "\\" in content:  # only escapes can stand for what UTF-8 cannot
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} contains a lone surrogate, which is not a character") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected {expected}")
    return found


def sha256(parts: Iterable) -> str:
    """The checksum, in hexadecimal, of the concatenation of bytes or arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# The names of types in safetensors.
TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
    torch.float64: "F64", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def open_safetensors(path: str | Path):
    """`safe_open`, with one-sentence errors: FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it may be damaged, cut short "
            "in a download, or in another format"
        ) from None


class Planned(NamedTuple):
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | Planned],
    metadata: dict[str, str],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write tensors one at a time, so that only one planned one is in memory, in the order given:
    what is read from shards and what is computed together stays together. `progress` is called with
    the bytes of each.

    Raises OSError if the file cannot be written, before anything is computed if the disk lacks
    space.
    """
    header: dict = {"__metadata__": metadata}
    places: dict[str, int] = {}
    end = 0
    # Largest types first, as in the library, so that tensors start at a multiple of their itemsize.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, x in ordered:
        places[name], end = end, end + prod(x.shape) * x.dtype.itemsize
        offsets = places[name], end
        header[name] = {"dtype": TYPES[x.dtype], "shape": x.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    with atomic_path(path) as temporary:
        disk, size = shutil.disk_usage(temporary.parent), len(text) + end
        if disk.total and disk.free < size:  # some file systems tell neither
            raise OSError(
                f"{path} cannot be written: it takes {size / 1e6:,.1f} MB and its disk has "
                f"{disk.free / 1e6:,.1f} MB left"
            )
        try:
            with open(temporary, "wb") as file:
                file.write(text)
                for name, x in tensors.items():
                    file.seek(len(text) + places[name])
                    progress(file.write(_bytes_of(x)))
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from None


def _bytes_of(x: Tensor | Planned) -> np.ndarray:
    computed = x.compute() if isinstance(x, Planned) else x
    computed = computed.detach().to("cpu", x.dtype).contiguous()
    return computed.flatten().view(torch.uint8).numpy()
