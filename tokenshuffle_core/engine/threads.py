"""How many threads small work on a CPU runs on: one, or all that torch uses.

Torch's threads wait for each other at the end of each operation. Where operations are small, as in
a step of a small model, that costs many times more than it gains as soon as another program is
busy. Only times can tell whether one is.
"""

import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

SHARE = 0.02  # of the time that the slower number may cost, to find out whether it still is slower


class Threads:
    """Runs repeated work on one thread or on all, whichever took less time lately.

    `ratio` is the time on all threads over that on one, None until both were tried. It depends on
    how busy the machine is more than on the work, so that there is one for all work. `seconds` are
    the recent times of each kind of work on the number of threads that is better now.
    """

    def __init__(self):
        self.ratio: float | None = None
        self.seconds: dict[Hashable, float | None] = {}
        self.savings = 0.0  # seconds that trying the slower number may cost now

    @contextmanager
    def chosen(self, kind: Hashable) -> Iterator[None]:
        """Inside, torch has the number of threads for one more piece of work of a `kind`; outside,
        all of them. The first piece of a kind does not count: it may allocate and pack."""
        every = torch.get_num_threads()
        if every == 1:
            yield
            return
        counts = kind in self.seconds
        usual = self.seconds.setdefault(kind, None)
        together = self._together(usual)
        torch.set_num_threads(every if together else 1)
        started = time.perf_counter()
        try:
            yield
            if counts:
                self._note(kind, usual, together, time.perf_counter() - started)
        finally:
            torch.set_num_threads(every)

    @property
    def together_is_better(self) -> bool:
        return self.ratio is not None and self.ratio < 1

    def _together(self, usual: float | None) -> bool:
        """Whether the next piece of work, which usually takes so long, is for all threads."""
        if usual is None:
            return self.together_is_better
        slower = 1 if self.ratio is None else max(self.ratio, 1 / self.ratio)
        trying = usual * (slower - 1) <= self.savings
        return self.together_is_better != trying

    def _note(self, kind: Hashable, usual: float | None, together: bool, seconds: float) -> None:
        better = self.together_is_better
        if together != better:
            self.savings += min(0.0, usual - seconds)
            ratio = seconds / usual if together else usual / seconds
            self.ratio = ratio if self.ratio is None else math.sqrt(self.ratio * ratio)
        else:
            self.savings += SHARE * seconds
            if together and usual:  # one thread might not have become slower, or faster, as well
                self.ratio *= (seconds / usual) ** 0.25
            self.seconds[kind] = seconds if usual is None else (usual + seconds) / 2
        if self.together_is_better != better:
            self.seconds = dict.fromkeys(self.seconds)
