"""Checksums, and writing files so that a crash, a full disk or Ctrl-C leaves no partial file."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds.

    Raises FileNotFoundError, which names the folder, if that does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"the folder {path.parent} does not exist, so {path.name} cannot be saved"
        )
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; this one gets the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all. Raises as `atomic_path`, and OSError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    path: str | Path, tensors: Mapping[str, Tensor | Planned], metadata: dict[str, str]
) -> None:
    """Write tensors one at a time, so that only one planned one is in memory.

    Raises OSError if the file cannot be written, such as on a full disk.
    """
    header: dict = {"__metadata__": metadata}
    end = 0
    # Largest types first, as in the library, so that tensors start at a multiple of their itemsize.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, x in ordered:
        start, end = end, end + prod(x.shape) * x.dtype.itemsize
        header[name] = {"dtype": TYPES[x.dtype], "shape": x.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, planned in ordered:
                    x = planned.compute() if isinstance(planned, Planned) else planned
                    x = x.detach().to("cpu", planned.dtype).contiguous()
                    file.write(x.flatten().view(torch.uint8).numpy())
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
