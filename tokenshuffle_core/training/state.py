"""What a training needs to go on, on disk: `state/STEP/`, a torch.distributed.checkpoint.

Each process writes what it holds, and any number of processes reads it back. A state is written
beside the others and renamed when it is complete: whatever is named by its step is complete.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from .distributed import barrier, rank

SETTINGS = "settings.json"


def latest(directory: Path) -> Path | None:
    """The newest state of the training in `directory`."""
    return max((directory / "state").glob("[0-9]*"), default=None, key=lambda path: int(path.name))


def save(directory: Path, step: int, tensors: dict, config, about: dict[str, str]) -> None:
    """Write the state after `step` steps and remove those before; every process calls it.

    `tensors` are nested dictionaries of tensors, the sharded ones DTensors; the fields of the
    dataclass `config` are stored beside them, and `about`, what else the training depends on.
    Raises OSError where a file cannot be written.
    """
    states = directory / "state"
    path, unfinished = states / f"{step:07}", states / ".unfinished"
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process has left
        unfinished.mkdir(parents=True)
        settings = json.dumps(asdict(config) | {"about": about})
        (unfinished / SETTINGS).write_text(settings, encoding="utf-8")
    barrier()
    try:
        with _alone_is_fine():
            dcp.save(tensors, checkpoint_id=unfinished)
    except CheckpointException as error:
        raise OSError(f"{path} cannot be saved: {_reason(error)}") from None
    if rank() == 0:
        unfinished.rename(path)
        for other in states.glob("[0-9]*"):
            if other != path:
                shutil.rmtree(other)


def restore(path: Path, tensors: dict, config, about: dict[str, str]) -> int:
    """Fill `tensors`, as given to `save`, in place and return the step; every process calls it.

    Raises ValueError where the state was made with another batch or seed, for another module, or
    differs in what is said `about` it.
    """
    stored = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    if stored["batch"] != config.batch or stored["seed"] != config.seed:
        raise ValueError(
            f"{path} was made with batch {stored['batch']} and seed {stored['seed']}: resume "
            "with the same"
        )
    known = stored.get("about", {})
    changed = [name for name in sorted(known.keys() | about) if known.get(name) != about.get(name)]
    if changed:
        raise ValueError(
            f"{path} was made with other {' and '.join(changed)}: resume with the same, or start "
            "anew, with --init from a finished checkpoint perhaps"
        )
    try:
        with _alone_is_fine():
            dcp.load(tensors, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(f"{path} does not fit this training: {_reason(error)}") from None
    return int(path.name)


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: CheckpointException) -> str:
    """What went wrong in the first process where something did."""
    reason, _ = next(iter(error.failures.values()))
    return str(reason)
