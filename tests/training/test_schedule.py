"""The clock as the schedule, with a clock that only the training moves on."""

import csv
import math
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import log_of, train
from tests.training.test_loop import LineTask, config, line
from tokenshuffle_core.training import schedule
from tokenshuffle_core.training.loop import fit
from tokenshuffle_core.training.settings import LoopConfig
from tokenshuffle_core.training.stages import parse_stages


class Clock:
    """Seconds that pass in what a task does."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class TimedTask(LineTask):
    """A second for a step, and some for what comes after the last one."""

    def __init__(self, clock: Clock, interrupt_at=None, validating=0.0, saving=0.0):
        super().__init__(interrupt_at)
        self.clock, self.validating, self.saving = clock, validating, saving
        self.validated, self.seen = [], []

    def loss(self, module, step, piece, pieces):
        self.clock.now += 1
        self.seen.append(self.progress)
        return super().loss(module, step, piece, pieces)

    def validate(self, module):
        self.clock.now += self.validating
        self.validated.append(self.clock.now)
        return super().validate(module)

    def save(self, module, path):
        self.clock.now += self.saving
        super().save(module, path)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


MINUTES = config(minutes=2, validate_every=1000, steps=3, warmup=10)


def rates(directory) -> dict[int, float]:
    return {step: value for step, name, value in log_of(directory) if name == "learning_rate"}


def test_the_minutes_are_used_and_the_learning_rate_ends_with_them(clock, tmp_path):
    task = TimedTask(clock)
    fit(line(), task, MINUTES, tmp_path, resume=False)
    assert clock.now == 1120
    assert task.seen == pytest.approx([second / 120 for second in range(120)])
    found = rates(tmp_path)
    assert found.keys() == {50, 100, 120}
    for step, rate in found.items():
        cosine = (1 + math.cos(math.pi * (step - 1) / 120)) / 2
        assert rate == pytest.approx(0.1 * (0.02 + 0.98 * cosine), rel=1e-4)
    assert found[120] == pytest.approx(0.1 * 0.02, rel=0.02)


def test_the_warm_up_is_in_steps():
    loop = LoopConfig(minutes=1, warmup=4, learning_rate=1.0)
    assert [loop.learning_rate_at(step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert loop.learning_rate_at(10**6, 1.0) == pytest.approx(0.02)


@pytest.mark.parametrize(("validating", "saving"), [(7, 3), (0.5, 0), (0, 20)])
def test_the_end_is_within_the_minutes(clock, tmp_path, validating, saving):
    task = TimedTask(clock, validating=validating, saving=saving)
    fit(line(), task, MINUTES, tmp_path, resume=False)
    assert 1119 <= clock.now <= 1120  # a step takes one second
    early, last = task.validated
    assert early == pytest.approx(1000 + 120 / 4 + 1 + validating, abs=1)
    assert last == pytest.approx(1120 - saving, abs=1)
    assert task.seen == sorted(task.seen)


def test_both_parts_of_the_end_are_known_in_time(clock, tmp_path):
    """A validation by steps, before the early one, does not replace the first saving."""
    task = TimedTask(clock, validating=1, saving=10)
    loop = config(minutes=2, validate_every=11, steps=3)
    fit(line(), task, loop, tmp_path, resume=False)
    assert 1119 <= clock.now <= 1120


def test_a_resumed_training_goes_on_where_its_clock_stood(clock, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(line(), TimedTask(clock), MINUTES, whole, resume=False)
    for at in (50, 90):
        with pytest.raises(KeyboardInterrupt):
            fit(line(), TimedTask(clock, interrupt_at=at), MINUTES, broken, resume=at > 50)
        clock.now += 5000
    fit(line(), TimedTask(clock), MINUTES, broken, resume=True)
    expected, found = (load_file(run / "final.safetensors") for run in (whole, broken))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert rates(broken) == rates(whole)


def test_minutes_that_are_used_up_are_not_used_again(clock, tmp_path):
    fit(line(), TimedTask(clock, validating=3, saving=2), MINUTES, tmp_path, resume=False)
    before = load_file(tmp_path / "final.safetensors")
    again = TimedTask(clock)
    fit(line(), again, MINUTES, tmp_path, resume=True)
    assert not again.seen
    after = load_file(tmp_path / "final.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_interrupted_training_leaves_a_checkpoint(clock, tmp_path):
    """At any time with Ctrl-C, and what was saved early where it is killed."""
    latest = tmp_path / "latest.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(line(), TimedTask(clock, interrupt_at=3), MINUTES, tmp_path, resume=False)
    first = load_file(latest)["weight"].item()
    seen = []

    class Killed(TimedTask):
        def loss(self, module, step, piece, pieces):
            seen.append(load_file(latest)["weight"].item())
            if step == 60:
                raise SystemExit
            return super().loss(module, step, piece, pieces)

    with pytest.raises(SystemExit):
        fit(line(), Killed(clock), MINUTES, tmp_path, resume=True)
    assert seen[0] == first
    assert seen[-1] != first
    assert load_file(latest)["weight"].item() == seen[-1]
    fit(line(), TimedTask(clock), MINUTES, tmp_path, resume=True)
    assert not latest.exists()


def test_a_real_clock(tmp_path):
    started = time.monotonic()
    train(tmp_path, minutes=0.05, steps=1, validate_every=10**6)
    taken = time.monotonic() - started
    assert 2 < taken < 5
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    final = [float(value) for _, name, value in rows if name == "learning_rate"][-1]
    assert 0.0199 < final / 3e-3 < 0.05  # the last step may take long on a busy machine


def test_a_stage_by_the_clock():
    (stage,) = parse_stages({"stage": [{"codes": "codes", "minutes": 3}]}).stages
    assert stage.loop.minutes == 3
    with pytest.raises(ValueError, match="stage 1 needs steps or minutes"):
        parse_stages({"stage": [{"codes": "codes"}]})
    with pytest.raises(ValueError, match="minutes must be at least 0, not -1"):
        parse_stages({"stage": [{"codes": "codes", "minutes": -1}]})
