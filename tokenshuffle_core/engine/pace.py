"""How many windows a step samples: as many as its device computes at little more than the price of
one."""

import logging

log = logging.getLogger(__name__)

# Windows that a step of so many finishes, measured on the bundled model. A model whose pictures are
# harder to guess finishes fewer, in proportion: see `Pace.gain`.
FINISHED = {1: 1.0, 8: 2.4, 16: 3.2, 32: 3.5}
TRIALS = 3  # steps of each number: the first may pack weights, allocate or capture
TRUST = 4  # windows: the weight of `FINISHED` against what was counted


class Pace:
    """Chooses the number of windows of the next step for one model, device and number of rows.

    The first steps try each of `counts`, in ascending order, for as long as more windows still pay,
    and take their times: they are steps of a picture like any other. Then the number with the most
    finished windows a second stays, unless guesses turn out to be wrong too often. One count alone
    is never changed.
    """

    def __init__(self, *counts: int):
        self.counts = sorted(counts)
        self.seconds: dict[int, list[float]] = {}
        self.steps = self.expected = self.found = 0.0
        self.chosen = self.counts[0] if len(counts) == 1 else None

    @property
    def most(self) -> int:
        return self.counts[-1]

    @property
    def trying(self) -> bool:
        """Whether the times of steps are still to be taken."""
        return self.chosen is None

    @property
    def count(self) -> int:
        """Windows that the next step should sample."""
        if self.chosen:
            return self.chosen
        return next(n for n in self.counts if len(self.seconds.get(n, ())) < TRIALS)

    def gain(self, count: int) -> float:
        """Windows that a step of `count` is expected to finish."""
        right = (TRUST + self.found) / (TRUST + self.expected)
        return 1 + (FINISHED[count] - 1) * right

    def note(self, count: int, finished: int, seconds: float | None = None) -> None:
        """A step of `count` windows finished so many, in so many seconds where they were taken."""
        if len(self.counts) == 1:
            return
        if count > 1 and count in FINISHED:
            # Against 1: the first window of a step is always finished.
            self.expected += FINISHED[count] - 1
            self.found += finished - 1
        if self.trying and seconds is not None and count == self.count:
            times = self.seconds.setdefault(count, [])
            times.append(seconds)
            if len(times) > 1 and self._is_enough(count, len(times) == TRIALS):
                self._choose()
                log.info("%d windows ahead; %s", self.chosen, self._times())
        elif self.chosen and self.chosen > 1:
            self._choose()

    def _is_enough(self, count: int, last: bool) -> bool:
        """Whether as many as `count` windows, and so more, do not pay: after its `last` trial, or
        clearly; or whether there are no more to try."""
        best = max((self._rate(n) for n in self.seconds if n < count), default=0.0)
        if not last:
            return best > 1.2 * self._rate(count)
        return best > self._rate(count) or count == self.most

    def _rate(self, count: int) -> float:
        """Finished windows a second."""
        return self.gain(count) / min(self.seconds[count][1:])

    def _choose(self) -> None:
        self.chosen = max(self.seconds, key=self._rate)

    def _times(self) -> str:
        return ", ".join(
            f"{count}: {1e3 * min(times[1:]):.2f} ms" for count, times in self.seconds.items()
        )
