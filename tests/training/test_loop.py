import csv
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tokenshuffle_core.training.loop import LoopConfig, batch_indices, fit

CONFIG = LoopConfig(
    steps=120, batch=4, learning_rate=0.1, warmup=10, validate_every=60, save_minutes=1e9
)


class LineTask:
    """Least squares on noisy points of a line; can be interrupted before a step."""

    def __init__(self, interrupt_at=None):
        self.interrupt_at = interrupt_at

    def loss(self, module, step):
        if step == self.interrupt_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(step))
        loss = (module(x) - (3 * x + 1)).square().mean()
        return loss, {}

    def validate(self, module):
        return {"slope": module.weight.item()}

    def sheet(self, module):
        return Image.new("RGB", (2, 2))

    def save(self, module, path):
        save_file(module.state_dict(), path)


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def log_of(directory):
    with open(directory / "log.csv", newline="") as file:
        return list(csv.reader(file))


def test_learning_rate_warms_up_and_follows_a_cosine():
    assert CONFIG.learning_rate_at(0) == pytest.approx(1e-2)
    assert CONFIG.learning_rate_at(9) == pytest.approx(0.1)
    for step in (10, 40, 119):
        cosine = (1 + math.cos(math.pi * (step - 10) / 110)) / 2
        assert CONFIG.learning_rate_at(step) == pytest.approx(0.1 * (0.02 + 0.98 * cosine))


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 4), (8, 4), (5, 13)])
def test_an_epoch_visits_every_item_once(count, batch):
    indices = torch.cat([batch_indices(count, batch, step, 0) for step in range(count)])
    for epoch in indices.split(count):
        assert sorted(epoch.tolist()) == list(range(count))
    assert batch_indices(100, 50, 0, seed=1).tolist() != batch_indices(100, 50, 0, seed=2).tolist()


def test_training_learns_and_leaves_its_record(tmp_path):
    final = fit(line(), LineTask(), CONFIG, tmp_path / "run", resume=False)
    losses = [float(value) for _, name, value in log_of(tmp_path / "run") if name == "loss"]
    assert losses[-1] < losses[0]
    assert load_file(final).keys() == {"weight", "bias"}
    assert (tmp_path / "run" / "sheet-0000120.png").exists()


def test_an_interrupted_run_continues_as_if_unbroken(tmp_path):
    whole = fit(line(), LineTask(), CONFIG, tmp_path / "whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        fit(line(), LineTask(interrupt_at=77), CONFIG, tmp_path / "broken", resume=False)
    resumed = fit(line(), LineTask(), CONFIG, tmp_path / "broken", resume=True)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    expected, found = (load_file(path) for path in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_folders_are_neither_overwritten_nor_made_up(tmp_path):
    fit(line(), LineTask(), CONFIG, tmp_path, resume=False)
    with pytest.raises(FileExistsError, match="already holds a training: add --resume"):
        fit(line(), LineTask(), CONFIG, tmp_path, resume=False)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        fit(line(), LineTask(), CONFIG, tmp_path / "other", resume=True)
    with pytest.raises(ValueError, match="resume with the same"):
        fit(line(), LineTask(), LoopConfig(120, 5, 1e-2), tmp_path, resume=True)


def test_bad_settings_are_refused():
    for bad in ({"steps": 0}, {"batch": -1}, {"learning_rate": float("nan")}):
        (name,) = bad
        with pytest.raises(ValueError, match=name):
            LoopConfig(**{"steps": 1, "batch": 1, "learning_rate": 1.0} | bad)
