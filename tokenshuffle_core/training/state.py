"""The state from which a training resumes, on disk: `state/STEP/`, written and read through
torch.distributed.checkpoint.

Each process writes its part, and any number of processes can read it back. A state gets its name
only when it is complete. It is JSON and safetensors alone: DCP's own files are pickles, which run
code when they are read.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..files import open_safetensors, write_safetensors
from .distributed import barrier, rank

SETTINGS = "settings.json"
PLACES = "tokenshuffle.places"  # in a part's metadata: name -> size of the whole tensor, offsets
OLD = ".metadata"  # DCP's pickle


def latest(directory: Path) -> Path | None:
    """The newest state of the training in `directory`."""
    return max(_all(directory), default=None, key=lambda path: int(path.name))


def _all(directory: Path) -> list[Path]:
    found = (directory / "state").glob("[0-9]*")
    return [path for path in found if path.name.isdecimal() and path.is_dir()]


def save(
    directory: Path, step: int, seconds: float, tensors: dict, config, about: dict[str, str]
) -> None:
    """Write the state after `step` steps and `seconds` of training and remove those before; every
    process calls it.

    `tensors` are nested dictionaries of tensors, the sharded ones DTensors. The fields of the
    dataclass `config` are stored with them, and so is `about`, what else the training depends on.
    Raises OSError where a file cannot be written.
    """
    states = directory / "state"
    path, unfinished = states / f"{step:07}", states / ".unfinished"
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
        unfinished.mkdir(parents=True)
        settings = json.dumps(asdict(config) | {"seconds": seconds, "about": about})
        (unfinished / SETTINGS).write_text(settings, encoding="utf-8")
    barrier()
    with _explained(OSError, f"{path} cannot be saved"):
        dcp.save(tensors, storage_writer=_Writer(unfinished))
    if rank() == 0:
        unfinished.rename(path)
        for other in _all(directory):
            if other != path:
                shutil.rmtree(other)


def restore(path: Path, tensors: dict, config, about: dict[str, str]) -> tuple[int, float]:
    """Fill `tensors`, as for `save`, in place and return the steps and the seconds; every process
    calls it.

    Raises ValueError or FileNotFoundError where the state is damaged, ValueError where it was saved
    with another batch, seed, optimizer or `about`, or for another module.
    """
    if (path / OLD).exists():
        raise ValueError(
            f"{path} was saved by an earlier version in a format that can run code, so it is not "
            "read: start a new training with --init from the checkpoint beside it"
        )
    stored, before, seconds = _settings(path / SETTINGS)
    if stored["batch"] != config.batch or stored["seed"] != config.seed:
        raise ValueError(
            f"{path} was saved with batch {stored['batch']} and seed {stored['seed']}: resume "
            "with the same"
        )
    if (optimizer := stored.get("optimizer", "adamw")) != config.optimizer:
        raise ValueError(f"{path} was saved with optimizer {optimizer}: resume with the same")
    names = sorted(before.keys() | about)
    if changed := [name for name in names if before.get(name) != about.get(name)]:
        raise ValueError(
            f"{path} was saved with other {' and '.join(changed)}: resume with the same, or start "
            "a new training, perhaps with --init from a finished checkpoint"
        )
    with _explained(ValueError, f"{path} does not fit this training"):
        dcp.load(tensors, storage_reader=_Reader(path))
    return int(path.name), seconds


def _settings(file: Path) -> tuple[dict, dict[str, str], float]:
    """What was stored, `about` and the seconds of it. Raises ValueError."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        about, seconds = stored.get("about", {}), float(stored.get("seconds", 0))
        if not {"batch", "seed"} <= stored.keys() or not isinstance(about, dict):
            raise ValueError("it does not hold the settings of a training")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"a training cannot have taken {seconds} seconds")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read, so there is nothing to resume: {error}") from None
    return stored, about, seconds


class _Writer(dcp.StorageWriter):
    """Writes the part of each process as one safetensors file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write_data(self, plan, planner) -> Future:
        parts = {item.index.fqn: item for item in plan.items}  # of a tensor, a process holds one
        places = {
            name: (item.tensor_data.size, item.tensor_data.chunk.offsets)
            for name, item in parts.items()
        }
        tensors = {name: planner.resolve_data(item) for name, item in parts.items()}
        path = self.folder / f"{rank():05}.safetensors"
        write_safetensors(path, tensors, {PLACES: json.dumps(places)})
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        results = [WriteResult(item.index, 0, None) for item in plan.items]
        return _done(results)

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def finish(self, metadata, results) -> None:
        """Each file says itself what it holds."""

    def reset(self, checkpoint_id=None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class _Reader(dcp.StorageReader):
    """Reads what any number of processes has written. Raises ValueError where a file is damaged or
    missing."""

    def __init__(self, folder: Path):
        self.files = {}  # index of a part -> its file
        whole: dict[str, described.TensorStorageMetadata] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = open_safetensors(path)
            for name, size, part in _parts(path, file):
                tensor = described.TensorStorageMetadata(described.TensorProperties(), size, [])
                tensor = whole.setdefault(name, tensor)
                tensor.chunks.append(part)
                self.files[described.MetadataIndex(name, part.offsets)] = file
                if size != tensor.size:
                    raise ValueError(f"{path}: {name} has another size than in another file")
        for name, tensor in whole.items():
            if sum(math.prod(part.sizes) for part in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"{folder} does not hold all of {name}: a file of it is missing")
        self.metadata = described.Metadata(whole)

    def read_metadata(self) -> described.Metadata:
        return self.metadata

    def read_data(self, plan, planner) -> Future:
        for item in plan.items:
            name, starts = item.storage_index.fqn, item.storage_offsets
            part = self.files[item.storage_index].get_tensor(name)
            lengths = zip(starts, item.lengths, strict=True)
            part = part[tuple(slice(start, start + length) for start, length in lengths)]
            planner.resolve_tensor(item).copy_(part)
        return _done(None)

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def reset(self, checkpoint_id=None) -> None: ...
    def set_up_storage_reader(self, metadata, is_coordinator: bool) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def _parts(path: Path, file) -> Iterator[tuple[str, torch.Size, described.ChunkStorageMetadata]]:
    """The name, the size of the whole tensor, and the part of it for each tensor of a file."""
    try:
        places = json.loads((file.metadata() or {})[PLACES])
        for name in file.keys():  # noqa: SIM118
            size, offsets = map(torch.Size, places[name])
            sizes = torch.Size(file.get_slice(name).get_shape())
            for whole, start, length in zip(size, offsets, sizes, strict=True):
                if not 0 <= start <= whole - length:
                    raise ValueError(f"{name} does not lie in a tensor of its size")
            yield name, size, described.ChunkStorageMetadata(offsets, sizes)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a part of a training's state: {error}") from None


def _done(result) -> Future:
    future = Future()
    future.set_result(result)
    return future


@contextmanager
def _explained(kind: type[Exception], what: str) -> Iterator[None]:
    """Raises `kind` with the reason of the first process that failed; one process alone is fine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            raise kind(f"{what}: {reason}") from None
