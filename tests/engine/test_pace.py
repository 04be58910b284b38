import random

import pytest
import torch

from tests.support.models import model_of
from tokenshuffle_core import engine
from tokenshuffle_core.checkpoints import BUNDLED
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine.pace import FINISHED, TRIALS, Pace
from tokenshuffle_core.engine.quantize import quantize, rounds_activations
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.sampler import Shape

CPU = torch.device("cpu")


def shape_of(**changes) -> Shape:
    about = {
        "batch": 1, "grid": (8, 8), "window": 2, "prompt": 64, "layout": None,
        "settings": GenerationConfig(), "has_given": False, "dtype": torch.float32, "device": CPU,
    }  # fmt: skip
    return Shape(**about | changes)


def draw(
    pace: Pace, costs: dict[int, float], right: float, windows: int
) -> tuple[float, list[int]]:
    """Seconds for a picture whose guesses are right with the probability `right`, on a device whose
    steps cost `costs`; and the numbers of windows of its steps."""
    rng, done, seconds, counts = random.Random(0), 0, 0.0, []
    while done < windows:
        count = pace.count
        finished = 1
        while finished < count and rng.random() < right:
            finished += 1
        pace.note(count, finished, costs[count])
        done, seconds = done + finished, seconds + costs[count]
        counts.append(count)
    return seconds, counts


COSTS = {
    "a GPU": {1: 1.0, 8: 1.0, 16: 1.05, 32: 1.1},
    "a small model on a CPU": {1: 1.0, 8: 1.3, 16: 1.7, 32: 2.6},
    "a large model on a CPU": {1: 1.0, 8: 4.0, 16: 8.0, 32: 16.0},
}


@pytest.mark.parametrize("device", COSTS)
@pytest.mark.parametrize("right", [0.0, 0.2, 0.6, 0.9])
def test_it_is_no_slower_than_one_window_and_near_the_best(device, right):
    """After the trial, whatever steps cost and however often guesses are right."""
    pace, costs = Pace(*FINISHED), COSTS[device]
    draw(pace, costs, right, 400)
    seconds, _ = draw(pace, costs, right, 400)
    assert seconds <= 1.02 * 400 * costs[1]
    best = min(draw(Pace(n), costs, right, 400)[0] for n in FINISHED)
    assert seconds <= 1.35 * best


@pytest.mark.parametrize("device", COSTS)
def test_a_trial_takes_few_steps(device):
    pace = Pace(*FINISHED)
    _, counts = draw(pace, COSTS[device], 0.6, 400)
    tried = [n for n in FINISHED if n in counts]
    assert not pace.trying
    assert all(2 <= len(pace.seconds[n]) <= TRIALS for n in tried)
    if device == "a large model on a CPU":
        assert max(counts) == 8  # more would cost more still


def test_the_first_step_of_each_number_does_not_count():
    pace = Pace(1, 8)
    for seconds in (9.0, 1.0, 1.1):
        pace.note(1, 1, seconds)
    for seconds in (99.0, 1.0, 1.2):
        pace.note(8, 3, seconds)
    assert pace.count == 8


def test_what_is_known_of_a_model_is_kept_until_it_changes():
    model = load(BUNDLED).model
    first = engine.pace(model, shape_of())
    assert engine.pace(model, shape_of(grid=(4, 4))) is first
    assert engine.pace(model, shape_of(window=1)) is not first
    engine.release(model)
    assert engine.pace(model, shape_of()) is not first


def test_one_window_where_more_would_not_give_the_same_picture_or_pay():
    model = model_of(2)
    assert engine.pace(model, shape_of()).most == 32
    assert engine.pace(model, shape_of(settings=GenerationConfig(cfg=1.0))).most == 32
    assert engine.pace(model, shape_of(batch=2)).most == 1
    assert engine.pace(model_of(1), shape_of(row_ends=True)).most == 16  # and up to two row ends
    quantize(model, "int8")
    engine.prepare(model, CPU)
    assert rounds_activations(model, CPU)
    assert engine.pace(model, shape_of()).most == 1
