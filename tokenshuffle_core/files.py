"""Checksums, and writing files so that a crash, a full disk or Ctrl-C leaves no half file."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` if the block succeeds.

    Raises FileNotFoundError naming the folder where it does not exist.
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
        # mkstemp makes files private; a saved picture has the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(parts: Iterable) -> str:
    """The checksum, in hexadecimal, of bytes or arrays one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# The names that safetensors has for the types of weights.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Planned(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_safetensors_in_turn(
    path: str | Path, tensors: dict[str, Planned], metadata: dict[str, str]
) -> None:
    """As `write_safetensors`, with one tensor in memory at a time."""
    header: dict = {"__metadata__": metadata}
    end = 0
    # Those of many bytes first, as the library writes them: each then starts at a multiple of its.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, planned in ordered:
        start, end = end, end + prod(planned.shape) * planned.dtype.itemsize
        header[name] = {
            "dtype": TYPES[planned.dtype], "shape": planned.shape, "data_offsets": (start, end)
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, planned in ordered:
            made = planned.make().detach().to(planned.dtype).contiguous()
            file.write(made.flatten().view(torch.uint8).numpy())


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """Raises OSError where the file cannot be written, such as on a full disk."""
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
