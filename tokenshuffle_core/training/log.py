"""The log of a training, and its speed."""

import csv
import math
import os
import time
from pathlib import Path

import torch

from ..files import atomic_path
from .distributed import world_size

LOG = "log.csv"
HEAD = ("step", "name", "value")


def is_log(path: Path) -> bool:
    """Whether a file is the log of a training, or there is none."""
    if not path.exists():
        return True
    with open(path, "rb") as file:
        head = file.read(100).decode("utf-8", "replace").splitlines()[:1]
    return head in ([], [",".join(HEAD)])


class Log:
    """log.csv with the columns step, name, value; also for TensorBoard if it is installed."""

    def __init__(self, directory: Path, first: int):
        path = directory / LOG
        kept = []
        if first and path.exists():
            with open(path, newline="") as file:
                rows = list(csv.reader(file))[1:]
            # A killed process may have left part of a row.
            kept = [row for row in rows if len(row) == 3 and int(row[0]) <= first]
        with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([HEAD, *kept])
        self.file = open(path, "a", newline="")  # noqa: SIM115
        self.writer = csv.writer(self.file)
        try:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(directory, purge_step=first + 1)
        except ImportError:
            self.board = None

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.writerow((step, name, f"{value:.6g}"))
            if self.board:
                self.board.add_scalar(name, value, step)
        self.file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.board:
            self.board.close()


class Speed:
    """Samples and codes per second of all processes together since the last restart, and model
    FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B): the share of the devices' measured
    `peak_flops`. Codes and MFU are logged if the task knows them.
    """

    def __init__(self, task, batch: int, device: torch.device, dtype: torch.dtype):
        self.batch = batch
        self.codes = task.codes_per_sample()
        self.share = task.flops_per_sample()  # seconds of all devices for one sample, at their peak
        if self.share:
            self.share /= peak_flops(device, dtype) * world_size()

    def restart(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    def measure(self, step: int) -> dict[str, float]:
        samples = self.batch * (step - self.step) / (time.perf_counter() - self.time)
        measured = {"samples_per_second": samples}
        if self.codes:
            measured["codes_per_second"] = samples * self.codes
        if self.share:
            measured["mfu"] = samples * self.share
        self.restart(step)
        return measured


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of `device` in the fastest of a few large square matrix
    products: measured, not from a data sheet."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    fastest = math.inf
    for _ in range(5):  # the first ones warm up
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * side**3 / fastest
