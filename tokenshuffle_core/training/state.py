"""The state from which a training resumes, on disk: `state/STEP/`, a torch.distributed.checkpoint.

Each process writes its part, and any number of processes can read it back. A state gets its name
only when it is complete.
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
        dcp.save(tensors, checkpoint_id=unfinished)
    if rank() == 0:
        unfinished.rename(path)
        for other in states.glob("[0-9]*"):
            if other != path:
                shutil.rmtree(other)


def restore(path: Path, tensors: dict, config, about: dict[str, str]) -> tuple[int, float]:
    """Fill `tensors`, as for `save`, in place and return the steps and the seconds; every process
    calls it.

    Raises ValueError where the state was saved with another batch, seed, optimizer or `about`, or
    for another module.
    """
    stored = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    if stored["batch"] != config.batch or stored["seed"] != config.seed:
        raise ValueError(
            f"{path} was saved with batch {stored['batch']} and seed {stored['seed']}: resume "
            "with the same"
        )
    if (optimizer := stored.get("optimizer", "adamw")) != config.optimizer:
        raise ValueError(f"{path} was saved with optimizer {optimizer}: resume with the same")
    before = stored.get("about", {})
    names = sorted(before.keys() | about)
    if changed := [name for name in names if before.get(name) != about.get(name)]:
        raise ValueError(
            f"{path} was saved with other {' and '.join(changed)}: resume with the same, or start "
            "a new training, perhaps with --init from a finished checkpoint"
        )
    with _explained(ValueError, f"{path} does not fit this training"):
        dcp.load(tensors, checkpoint_id=path)
    return int(path.name), stored.get("seconds", 0.0)


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
