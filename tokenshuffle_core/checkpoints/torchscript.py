"""TorchScript archives (`.jit`), which are programs: their tensors alone are read, nothing is run.

Such an archive is a zip with a pickle of the attributes of all modules, written by PyTorch's own
code (torch/csrc/jit/serialization/pickler.cpp), which uses few of the instructions that a pickle
may hold. Those are known here and no others, and there is nothing that they could call.
"""

import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SUFFIX = ".jit"
MODULE = re.compile(r"__torch__(\.\w+)* \w+")
TENSOR, DICT = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
# What an attribute that is no tensor may ask for: lists and dictionaries with the types of their
# elements.
RESTORED = re.compile(r"torch\.jit\._pickle (build_(int|double|bool|tensor)list|restore_type_tag)")
STORAGES = {
    "torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8, "torch BoolStorage": torch.bool,
}  # fmt: skip
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()
LARGEST = 2**40  # size, step or place of a tensor


class _Global(NamedTuple):
    name: str


class _Module(NamedTuple):
    attributes: dict


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Stored(NamedTuple):
    """A tensor as the pickle describes it; `shape` and `stride` are still unchecked."""

    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


@contextmanager
def opened(path: Path, ours: re.Pattern | None = None) -> Iterator[zipfile.ZipFile]:
    """The zip file, of which only entries whose names match `ours`, by default all, are read.

    PyTorch stores its records uncompressed, so one that expands would be a zip bomb. Raises
    ValueError for that, and with a sentence for what its reader raises.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not ours or ours.fullmatch(e.filename)]
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > size:
                raise ValueError(f"{path} claims more data than its {size} bytes")
            yield archive
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not in PyTorch's zip format ({error}): it may be damaged or cut short, or "
            "older than PyTorch 1.6"
        ) from None


def tensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """The name, as in a state dict, the shape and the reader of each tensor. Raises ValueError."""
    with opened(path, re.compile(r"[^/]+/data(\.pkl|/.*)")) as archive:
        pickles = [n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)]
        if len(pickles) != 1:
            raise ValueError(f"{path} has {len(pickles)} pickles of modules: it is no TorchScript")
        pickle = archive.read(pickles[0])
        entries = {entry.filename: entry for entry in archive.infolist()}
    try:
        top = _built(pickle)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: its pickle is damaged ({error!r:.100})") from None
    if not isinstance(top, _Module):
        raise ValueError(f"{path} holds no modules: it is no TorchScript")
    found = set()
    for name, stored in _named(top, 10**6 + 100 * len(pickle), path):
        if name in found:
            raise ValueError(f"{path}: {name} occurs twice")
        found.add(name)
        record = f"{pickles[0].removesuffix('.pkl')}/{stored.storage.key}"
        entry = entries.get(record)
        if entry is None:
            raise ValueError(f"{path}: the data of {name} is missing")
        _check(stored, entry.file_size, f"{path}: {name:.200}")
        yield name, stored.shape, partial(_read, path, record, stored)


def _named(top: _Module, most: int, path: Path) -> Iterator[tuple[str, _Stored]]:
    """All tensors with their dotted names. Modules may be used more than once, but not so often
    that to name their parts takes for ever."""
    waiting = [("", top)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, _Stored):
            yield name, value
            continue
        parts = []
        for key, part in value.attributes.items():
            most -= len(name) + len(key) + 1
            if most < 0:
                raise ValueError(f"{path}: its modules hold each other too often")
            if isinstance(part, _Module | _Stored):
                parts.append((f"{name}.{key}" if name else key, part))
        waiting += reversed(parts)


def _check(stored: _Stored, size: int, where: str) -> None:
    """Raises ValueError for a tensor that does not lie in the `size` bytes of its storage."""
    shape, stride, width = stored.shape, stored.stride, stored.storage.dtype.itemsize
    numbers = (stored.offset, *shape, *stride)
    whole = all(type(x) is int and 0 <= x < LARGEST for x in numbers)
    if not whole or len(shape) != len(stride):
        raise ValueError(f"{where} is no tensor")
    last = stored.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and max(math.prod(shape), last + 1) * width > size:
        raise ValueError(f"{where} claims more data than it has: {shape!s:.100}")


def _read(path: Path, record: str, stored: _Stored) -> Tensor:
    if 0 in stored.shape:
        return torch.empty(0, dtype=stored.storage.dtype).view(stored.shape)
    with opened(path, re.compile(re.escape(record))) as archive:
        data = bytearray(archive.read(record))  # whose checksum this compares
    _check(stored, len(data), f"{path}: {record}")  # the file may have been replaced
    numbers = torch.frombuffer(
        data, dtype=stored.storage.dtype, count=len(data) // stored.storage.dtype.itemsize
    )
    return numbers.as_strided(stored.shape, stored.stride, stored.offset)


def _built(pickle: bytes) -> object:
    """What the pickle builds: modules and tensors, and in the place of other objects None.

    Raises ValueError for an instruction that TorchScript does not use, and for what it would not
    ask for; a pickle that is damaged otherwise raises what Python does.
    """
    stack: list = []
    memo: dict[int, object] = {}

    def taken() -> list:
        """What is above the last mark, which goes as well."""
        values = []
        while (value := stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    for operation, argument, _ in pickletools.genops(pickle):
        name = operation.name
        if name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(MARK)
        elif name in TUPLES:
            values = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "TUPLE":
            stack.append(tuple(taken()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else taken()
            stack[-1].extend(values)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("SETITEM", "SETITEMS"):
            values = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else taken()
            if not all(isinstance(key, str | int | float) for key in values[::2]):
                raise ValueError("the pickle has a key that is neither a name nor a number")
            _expect(stack[-1], dict).update(zip(values[::2], values[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_allowed(argument))
        elif name == "NEWOBJ":
            stack.pop()
            if not MODULE.fullmatch(_expect(stack.pop(), _Global).name):
                raise ValueError("the pickle makes an object that is no module")
            stack.append(_Module({}))
        elif name == "BUILD":
            state = _expect(stack.pop(), dict)
            if not all(isinstance(key, str) for key in state):
                raise ValueError("the pickle has an attribute without a name")
            _expect(stack[-1], _Module).attributes.update(state)
        elif name == "BINPERSID":
            stack.append(_storage(*_expect(stack.pop(), tuple)))
        elif name == "REDUCE":
            arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Global)
            stack.append(_reduced(function.name, arguments))
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"the pickle has the instruction {name}, which TorchScript lacks")
    raise ValueError("the pickle has no end")


def _expect(value: object, kind: type):
    if not isinstance(value, kind):
        raise ValueError("the pickle is not one of TorchScript")
    return value


def _allowed(name: str) -> _Global:
    if name in STORAGES or name in (TENSOR, DICT):
        return _Global(name)
    if not MODULE.fullmatch(name) and not RESTORED.fullmatch(name):
        raise ValueError(
            f"the pickle asks for {name[:100]!r}; only tensors are read, since anything else could "
            "run code"
        )
    return _Global(name)


def _storage(kind: str, dtype: _Global, key: str, *_) -> _Storage:
    """`_` is the device and the number of elements, which the entry's size tells as well."""
    if kind != "storage" or _expect(dtype, _Global).name not in STORAGES:
        raise ValueError("the pickle has data that is no storage of a tensor")
    return _Storage(STORAGES[dtype.name], _expect(key, str))


def _reduced(function: str, arguments: tuple) -> object:
    if function == DICT:
        return {}
    if function != TENSOR:  # a list or a tuple of values, which is no weight
        return None
    storage, offset, shape, stride, *_ = arguments
    storage, shape = _expect(storage, _Storage), _expect(shape, tuple)
    return _Stored(storage, offset, shape, _expect(stride, tuple))
