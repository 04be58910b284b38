"""How far a training is, by its steps or, with `minutes`, by the clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch

from .distributed import from_first
from .settings import LoopConfig

ENDING = 2  # parts: validation and saving
EARLY = 0.25  # share of the minutes after which a training has been validated and saved once


class Schedule:
    """Resumed after `first` steps and `seconds`.

    With `minutes`, process 0's clock decides for all. What comes after the last step, a validation
    and a saved state, is within the minutes: their longest time so far is set aside, so both happen
    early in the training as well.
    """

    def __init__(self, config: LoopConfig, device: torch.device):
        self.config, self.device = config, device
        self.first, self.started = 0, time.monotonic()
        self.closing: dict[str, float] = {}  # the longest time that each part of the end took
        self.ended: torch.cuda.Event | None = None  # the step before, on the device

    def resume(self, first: int, seconds: float) -> None:
        """Go on after `first` steps, which took `seconds`."""
        self.first = first
        self.started -= seconds

    def seconds(self) -> float:
        """Seconds of training; time while it was interrupted does not count."""
        return time.monotonic() - self.started

    def steps(self) -> Iterator[int]:
        """The numbers of the steps; ends when `after` has found the last one."""
        self.closed = self.config.minutes > 0 and self.progress(self.first) >= 1
        for step in count(self.first) if self.config.minutes else range(self.first, self.total):
            if self.closed:
                return
            yield step

    @property
    def total(self) -> int | None:
        """How many steps there will be, if that is known."""
        return None if self.config.minutes else self.config.steps

    def progress(self, step: int) -> float:
        """The share of the training that is over before step `step`, the same in all processes."""
        if not self.config.minutes:
            return step / self.config.steps
        self.begun = self.seconds()
        (share,) = from_first(min(1.0, self.begun / self._end()))
        return share

    def after(self, done: int) -> tuple[bool, bool]:
        """Whether the step that is done is the last one, and whether it is time for an early
        validation."""
        if not self.config.minutes:
            return done == self.config.steps, False
        self._wait()
        now = self.seconds()
        last = 2 * now - self.begun > self._end()  # no step begins that would end too late
        early = len(self.closing) < ENDING and now > EARLY * self._end()
        last, early = from_first(last, early)
        self.closed = bool(last)
        return self.closed, bool(early)

    def _end(self) -> float:
        """The second at which the last step ends."""
        budget = 60 * self.config.minutes
        return max(budget - sum(self.closing.values()), 1e-3 * budget)

    def _wait(self) -> None:
        """Not to run ahead of the device by more than a step: its clock counts."""
        if self.device.type == "cuda":
            before, self.ended = self.ended, torch.cuda.Event()
            self.ended.record()
            if before is not None:
                before.synchronize()

    @contextmanager
    def ending(self, part: str) -> Iterator[None]:
        """Around what is done at the end as well."""
        started = time.monotonic()
        yield
        taken = time.monotonic() - started
        self.closing[part] = max(taken, self.closing.get(part, 0.0))
