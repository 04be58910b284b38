import math
from contextlib import nullcontext

import pytest
import torch

from tests.support.models import model_of, random_checkpoint
from tokenshuffle_core import engine
from tokenshuffle_core.engine.threads import Threads

CPU = torch.device("cpu")
IDLE, BUSY = {1: 1.5e-3, 2: 1e-3}, {1: 1.6e-3, 2: 40e-3}
TINY = {1: 1e-5, 2: 2e-5}  # too small for two threads even where nothing else runs


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass only as a test lets them."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def work(threads: Threads, clock: list[float], costs: dict[int, float], pieces: int) -> float:
    """The seconds that so many pieces take, of two kinds in turn; one is twice as large."""
    started = clock[0]
    for i in range(pieces):
        with threads.chosen(i % 2):
            clock[0] += costs[torch.get_num_threads()] * (1 + i % 2)
    return clock[0] - started


@pytest.mark.parametrize("costs", [IDLE, BUSY, TINY])
def test_it_is_near_the_better_number_after_few_pieces(clock, costs):
    threads, best = Threads(), min(costs.values())
    # One piece each on the number that turns out to be worse, at most.
    assert work(threads, clock, costs, 20) < (30 + 2 + 2) * best + 2 * max(costs.values())
    assert work(threads, clock, costs, 2000) < 1.03 * 3000 * best


def test_it_follows_when_the_machine_becomes_busy_and_idle_again(clock):
    threads = Threads()
    work(threads, clock, IDLE, 100)
    assert threads.ratio < 1
    # A few pieces on two threads tell, and after some time one on two threads is tried again.
    assert work(threads, clock, BUSY, 1000) < 1.1 * 1500 * BUSY[1]
    assert threads.ratio > 1
    work(threads, clock, IDLE, 4000)
    assert threads.ratio < 1
    assert work(threads, clock, IDLE, 1000) < 1.03 * 1500 * IDLE[2]


def test_a_single_slow_piece_changes_little(clock):
    threads = Threads()
    work(threads, clock, IDLE, 100)
    work(threads, clock, BUSY, 1)
    assert work(threads, clock, IDLE, 2000) < 1.05 * 3000 * IDLE[2]


def test_the_first_piece_of_a_kind_does_not_count(clock):
    threads = Threads()
    with threads.chosen("packs"):
        clock[0] += 9
    assert threads.seconds == {"packs": None}
    work(threads, clock, IDLE, 100)
    assert threads.ratio == pytest.approx(IDLE[2] / IDLE[1])


def test_threads_are_restored():
    threads = Threads()
    for _ in range(2):
        with threads.chosen("work"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads.chosen("work"):
        raise KeyError
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with threads.chosen("other"):
        assert torch.get_num_threads() == 1
    assert "other" not in threads.seconds


def test_only_small_work_on_a_cpu_is_on_fewer_threads():
    model = model_of(2)
    parameters = sum(weight.numel() for weight in model.parameters())
    most = engine.SMALL // parameters
    threads_for = engine.threads(model, CPU)
    assert isinstance(threads_for(most + 1), nullcontext)
    with threads_for(most):  # a kind that is new
        assert torch.get_num_threads() in (1, 2)
    assert engine.threads(model, torch.device("cuda")) is nullcontext


@pytest.mark.parametrize("threads", [1, 2])
def test_pictures_are_the_same_and_between_steps_all_threads_are_there(monkeypatch, threads):
    pipeline = random_checkpoint()
    expected = pipeline.generate("x", seed=3)
    tried = Threads()
    tried.ratio = {1: math.inf, 2: 0.5}[threads]
    monkeypatch.setattr(engine, "THREADS", tried)
    steps = [(step.codes, torch.get_num_threads()) for step in pipeline.stream("x", seed=3)]
    assert {count for _, count in steps} == {2}
    codes, _ = steps[-1]
    assert torch.equal(codes, expected.codes)
    assert torch.allclose(pipeline.decode(codes), expected.images, atol=1e-5)
    assert torch.equal(pipeline.encode(expected.images), pipeline.encode(expected.images))
    assert torch.get_num_threads() == 2
    assert {kind[0].__name__ for kind in tried.seconds} == {"TokenShuffleModel", "ImageTokenizer"}
