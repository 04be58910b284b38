"""The tensors of an untrusted checkpoint, in any of the formats that are published.

Reads safetensors; pickles saved by PyTorch as zip files, only with `weights_only=True`; and the
tensors of TorchScript archives, which are not run. One file, or a folder with several, such as one
of Hugging Face's cache. Files are memory-mapped or read in parts, and a tensor is read on demand. A
file that claims more data than it has, or whose pickle asks for code to run, is refused with a
sentence that names it.
"""

import argparse
import json
import pickletools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..files import open_safetensors
from . import torchscript

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# Keys that wrap a state dict in such a file, and prefixes that training adds to its names.
WRAPPERS = ("model", "module", "state_dict")
EVERY_WRAPPER = (*WRAPPERS, "ema")  # averaged weights as well, which not every reader wants
PREFIXES = ("_fsdp_wrapped_module.", "_orig_mod.", "module.")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin", "model.ckpt")
PROGRAMS = ("encoder.jit", "decoder.jit")  # the two halves of one model
# What is read as tensors alone, whose names and shapes must fit.
WEIGHTS = (".safetensors", *PICKLES, torchscript.SUFFIX)
MODELS_INSIDE = (
    "final.safetensors", "latest.safetensors", "*.safetensors", *(f"*{end}" for end in PICKLES),
    "models--*/snapshots/*/config.json", "*/config.json", "*/final.safetensors",
)  # fmt: skip
# What a pickle of tensors may import; argparse's Namespace is harmless, and training scripts save
# their options in one.
PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
    r"|torch (Size|float32|float16|bfloat16)|argparse Namespace"
)
LOCK = threading.Lock()  # PyTorch's list of safe globals is shared by all threads


class Source:
    """Names -> tensors. Raises FileNotFoundError, or ValueError with one sentence.

    Attributes: `path`, with the snapshot in the place of a model's folder in Hugging Face's cache,
    its `name`, and the `shapes` of all tensors.
    """

    def __init__(self, path: str | Path, wrappers: tuple[str, ...] = WRAPPERS):
        self.path = snapshot_of(Path(path))
        if not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if not self.path.is_dir() and not self.path.is_file():  # a pipe is read without end
            raise ValueError(f"{path} is not a file")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        files = list(self._files())
        for file in files:
            for name, shape, reader in _tensors(file, wrappers):
                if name in self.shapes:
                    raise ValueError(f"{file}: {name} is also in another file of this folder")
                self.shapes[name], self._readers[name] = shape, reader
        if not self.shapes:
            raise ValueError(f"{path} holds no weights")

    @cached_property
    def config(self) -> dict:
        """A folder's config.json. Raises as the class does."""
        return self.json("config.json") if self.path.is_dir() else {}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        """The tensor. Raises ValueError if it is missing or not of a float type."""
        if name not in self.shapes:
            raise ValueError(f"{self.path}: {name} is missing")
        tensor = self._readers[name]()
        if not tensor.is_floating_point():
            raise ValueError(f"{self.path}: {name} holds {tensor.dtype}, not weights")
        return tensor

    def shape_of(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises ValueError if it is missing or has other dimensions."""
        if name not in self:
            raise ValueError(f"{self.path}: {name} is missing")
        if len(self.shapes[name]) != dimensions or 0 in self.shapes[name]:
            raise ValueError(f"{self.path}: {name} has the shape {self.shapes[name]}")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        """The number of layers, with {} for a layer's index in the pattern. Raises ValueError for
        0."""
        layers = 0
        while pattern.format(layers) in self:
            layers += 1
        if not layers:
            raise ValueError(f"{self.path}: {pattern.format(0)} is missing")
        return layers

    def json(self, name: str) -> dict:
        """A JSON file of the folder, or beside the file. Raises as the class does."""
        file = self.file(name)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file} is not a JSON object")
        return values

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def name(self) -> str:
        return name_of(self.path)

    def beside(self, *names: str) -> Path:
        """The model's image tokenizer, under the first of these names of files or folders that is
        inside this folder, beside it, or beside it in Hugging Face's cache; a folder may have been
        converted to a file of its name. Raises FileNotFoundError."""
        around = self.path.resolve().parent
        for folder in (self.path, self.path.parent, around):
            for name in names:
                for found in (folder / name, folder / f"{name}.safetensors"):
                    if found.exists():
                        return found
        if around.name == "snapshots":
            for name in names:
                for found in sorted(around.parents[1].glob(f"models--*--{name}")):
                    return found
        first = names[0]
        if first.endswith(PICKLES):
            how = f"put {first} beside it, or pass its file"
        else:
            how = f"put the folder {first} beside it, or pass its path as the image tokenizer"
        raise FileNotFoundError(f"{self.path} needs its image tokenizer: {how}")

    def file(self, name: str) -> Path:
        """A file of the folder, or beside the file, by a name that may not lead out of it. A link
        may, if it is to weights, to a blob of Hugging Face's cache or to a file of the same name.
        Raises as the class does."""
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"{self.path}: the name {name!r:.100} leads out of the folder")
        if len(name) > 200:
            raise ValueError(f"{self.path}: the name {name!r:.100} is too long for a file")
        file, folder = self.folder / name, self.folder.resolve()
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist or is not a file")
        # Whoever packed a folder chose its links, and who unpacked it owns them. Texts are copied
        # into what is converted, so none may come from a file that is not what its name says.
        if not name.lower().endswith(WEIGHTS):
            target = file.resolve()
            cached = target.parent.name == "blobs" and target.parent.parent.name[:8] == "models--"
            if target.parent != folder and target.name != name and not cached:
                raise ValueError(
                    f"{file} is a link to another folder and name: replace it with the file"
                )
        return file

    def _files(self) -> Iterator[Path]:
        if not self.path.is_dir():
            yield self.path
            if self.path.name.lower() in PROGRAMS:
                yield _other_half(self.path)
            return
        for name in INDICES:
            if (self.path / name).is_file():
                index = self.json(name).get("weight_map")
                if not isinstance(index, dict) or not all(
                    isinstance(x, str) for x in index.values()
                ):
                    raise ValueError(f"{self.path / name} has no weight_map of file names")
                yield from (self.file(shard) for shard in sorted(set(index.values())))
                return
        for name in WHOLE:
            if (self.path / name).is_file():
                yield self.file(name)
                return
        if (self.path / "config.json").is_file():  # whatever the only file of a model is called
            named = [file for file in self.path.iterdir() if file.suffix.lower() in WEIGHTS]
            models = [file for file in named if file.is_file() and not file.name.startswith("vq_")]
            if len(models) == 1 and models[0].suffix.lower() != torchscript.SUFFIX:
                yield self.file(models[0].name)
                return
        if any((self.path / name).is_file() for name in PROGRAMS):
            yield from (self.file(name) for name in PROGRAMS)
            return
        if instead := _instead_of(self.path):
            raise FileNotFoundError(f"{self.path} is not a model: give {instead}")
        raise FileNotFoundError(f"{self.path} has none of {', '.join((*INDICES, *WHOLE))}")


def name_of(path: str | Path) -> str:
    """What a model's file or folder is called, or the model in Hugging Face's cache."""
    path = snapshot_of(Path(path))
    folder = path.parent if path.name.lower() in PROGRAMS else path
    if not folder.is_dir():
        return folder.stem
    real = folder.resolve()
    cached = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.parent.parent.name.rpartition("--")[2] if cached else real.name


def _other_half(program: Path) -> Path:
    """The file of the decoder beside that of the encoder, or the other way round."""
    (other,) = {*PROGRAMS} - {program.name.lower()}
    for file in program.parent.iterdir():
        if file.name.lower() == other and file.is_file():
            return file
    raise FileNotFoundError(f"{program} is one half of a model: put its {other} beside it")


def snapshot_of(path: Path) -> Path:
    """The snapshot in a model's folder of Hugging Face's cache, which `main` refers to if there are
    several; any other path as it is. Raises ValueError if nothing says which."""
    if not path.is_dir() or not (path / "snapshots").is_dir() or (path / "config.json").exists():
        return path
    found = sorted(each for each in (path / "snapshots").iterdir() if each.is_dir())
    main = path / "refs" / "main"
    named = main.read_bytes()[:200].decode(errors="replace").strip() if main.is_file() else ""
    chosen = [each for each in found if each.name == named] or found
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise FileNotFoundError(f"{path} has no snapshot: download the model again")
    raise ValueError(f"{path} has {len(chosen)} snapshots: give one of them, such as {chosen[0]}")


def _instead_of(folder: Path) -> Path | None:
    """What to give in the place of a folder that is not a model, such as a training's or one of
    Hugging Face's cache: the newest of the first kind that is there."""
    for pattern in MODELS_INSIDE:
        if found := [path for path in folder.glob(pattern) if path.is_file()]:
            newest = max(found, key=lambda path: path.stat().st_mtime)
            return newest.parent if newest.name == "config.json" else newest
    return None


def whole_of(file: str | Path) -> str:
    """What to give in the place of a file that is a part of a model in its folder."""
    folder = Path(file).parent
    return f": give its folder, {folder}" if (folder / "config.json").is_file() else ""


def _tensors(
    file: Path, wrappers: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    if file.suffix.lower() in PICKLES:
        for name, tensor in read_pickle(file, wrappers).items():
            yield name, tuple(tensor.shape), lambda tensor=tensor: tensor
        return
    if file.suffix.lower() == torchscript.SUFFIX:
        yield from torchscript.tensors(file)
        return
    opened = open_safetensors(file)
    for name in opened.keys():  # noqa: SIM118
        shape = tuple(opened.get_slice(name).get_shape())
        yield name, shape, lambda name=name: opened.get_tensor(name)


def read_pickle(path: Path, wrappers: tuple[str, ...] = WRAPPERS) -> dict[str, Tensor]:
    """The state dict of a zip file saved by PyTorch, memory-mapped.

    Raises ValueError if the file asks for code, claims more data than it has, or is not a state
    dict.
    """
    _check_zip(path)
    try:
        with LOCK, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can make the reader raise anything
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {text})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a state dict")
    inner = [content[name] for name in wrappers if isinstance(content.get(name), dict)]
    tensors: dict[str, Tensor] = {}
    for name, tensor in (inner[0] if inner else content).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        for prefix in PREFIXES:
            name = name.replace(prefix, "")
        if name in tensors:
            raise ValueError(f"{path}: {name} occurs twice")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name} is not an ordinary tensor")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims more data than it has: {tuple(tensor.shape)}")
        tensors[name] = tensor.detach()
    return tensors


def _check_zip(path: Path) -> None:
    """A pickle of tensors imports nothing except what PLAIN lists."""
    with torchscript.opened(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    if len(pickles) != 1:  # TorchScript, which is a program, has two
        raise ValueError(f"{path} has {len(pickles)} pickles: it is not a state dict")
    try:
        imports = _imports(pickles[0])
    except Exception as error:
        raise ValueError(f"{path}: its pickle is damaged ({error})") from None
    for name in imports:
        if not PLAIN.fullmatch(str(name)):
            raise ValueError(
                f"{path}: the pickle asks for {str(name)[:100]!r}; only tensors are read, since "
                "anything else could run code"
            )


def _imports(pickle: bytes) -> list[object]:
    """What a pickle imports, without running it.

    Raises ValueError if what it builds has parts that hold each other so often that to compare or
    to print it, which the reader's errors do, takes for ever.
    """
    most = 10**6 + 100 * len(pickle)
    imports: list[object] = []
    stack: list[_Built] = []
    memo: dict[int, _Built] = {}
    for operation, argument, _ in pickletools.genops(pickle):
        name, before = operation.name, operation.stack_before
        if name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            imports.append(argument)
        if name == "MEMOIZE" or "PUT" in name:
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            continue
        if "GET" in name or name == "DUP":
            found = stack[-1] if name == "DUP" else memo[argument]
            found.shared = True
            stack.append(found)
            continue
        taken = []
        if pickletools.markobject in before:
            while not (last := stack.pop()).mark:
                taken.append(last)
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        size = 1 + sum(each.size for each in taken)
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "ADDITEMS"):
            changed = taken[-1]
            if changed.shared:
                raise ValueError("it changes what it has used")
            changed.size = size
            stack.append(changed)
        elif operation.stack_after:
            size += len(argument) if isinstance(argument, str | bytes) else 0
            stack.append(_Built(size, name == "MARK"))
        if size > most:
            raise ValueError("its parts hold each other too often")
    return imports


@dataclass
class _Built:
    """An object on a pickle's stack: the size of it written out, and whether it has been used."""

    size: int
    mark: bool = False
    shared: bool = False
