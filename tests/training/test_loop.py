import csv
import json
import math
import os
import random
import reprlib
import signal
import subprocess
import sys
import time
import timeit
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support.processes import CodesTask, log_of, model, train, weights_of
from tokenshuffle_core.stopping import SIGNALS
from tokenshuffle_core.training.log import peak_flops
from tokenshuffle_core.training.loop import Task, fit
from tokenshuffle_core.training.model import training_flops
from tokenshuffle_core.training.settings import LoopConfig

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = LoopConfig(
    steps=120, batch=4, learning_rate=0.1, warmup=10, validate_every=60, save_minutes=1e9
)


class LineTask(Task):
    """Least squares on points of the line 3 x + 1; can be interrupted in a step."""

    def __init__(self, interrupt_at=None, by=signal.SIGINT):
        super().__init__()
        self.interrupt_at, self.by = interrupt_at, by
        self.weights = []  # before each step

    def loss(self, module, step, piece, pieces):
        self.weights.append(module.weight.item())
        if step == self.interrupt_at:
            signal.raise_signal(self.by)
        x = torch.randn(16, 1, generator=torch.Generator().manual_seed(step))
        loss = (module(x) - (3 * x + 1))[piece::pieces].square().mean()
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


def config(**changes) -> LoopConfig:
    return LoopConfig(**vars(CONFIG) | changes)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_learning_rate_warms_up_and_follows_a_cosine():
    assert CONFIG.learning_rate_at(0) == pytest.approx(1e-2)
    assert CONFIG.learning_rate_at(9) == CONFIG.learning_rate_at(10) == pytest.approx(0.1)
    for step in (10, 40, 119):
        cosine = (1 + math.cos(math.pi * (step - 10) / 110)) / 2
        assert CONFIG.learning_rate_at(step) == pytest.approx(0.1 * (0.02 + 0.98 * cosine))


def test_learning_rate_at_the_corners():
    assert config(warmup=0).learning_rate_at(0) == pytest.approx(0.1)
    assert config(warmup=0, steps=1).learning_rate_at(0) == pytest.approx(0.1)
    longer = config(warmup=200)  # never warm
    assert longer.learning_rate_at(119) == pytest.approx(0.1 * 120 / 200)
    for step in (120, 1000):  # a resumed training that was longer before
        assert CONFIG.learning_rate_at(step) == pytest.approx(0.1 * 0.02)
    assert config(final_learning_rate=0.0).learning_rate_at(120) == pytest.approx(0)


def test_training_learns_and_leaves_its_record(tmp_path):
    module = line()
    final = fit(module, LineTask(), CONFIG, tmp_path / "run", resume=False)
    assert (module.weight.item(), module.bias.item()) == pytest.approx((3, 1), abs=0.01)
    assert load_file(final).keys() == {"weight", "bias"}
    assert (tmp_path / "run" / "sheet-0000120.png").exists()
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["0000120"]


def test_the_saved_weights_are_the_moving_average(tmp_path):
    module, task = line(), LineTask()
    final = fit(module, task, config(ema=0.9), tmp_path, resume=False)
    first, *others = [*task.weights, module.weight.item()]
    expected = first
    for step, weight in enumerate(others):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert load_file(final)["weight"].item() == pytest.approx(expected, rel=1e-5)
    (slope,) = [value for step, name, value in log_of(tmp_path) if (step, name) == (120, "slope")]
    assert slope == pytest.approx(expected, rel=1e-5)


def test_the_average_of_a_short_training_is_not_of_its_initial_weights():
    """Whose share is 0.9 after ten steps with the full decay."""
    remembered = [math.prod(config(ema=0.99).ema_at(i) for i in range(n)) for n in (10, 100, 2000)]
    assert remembered[0] < 0.01
    assert remembered[1] < 1e-7
    assert [config(ema=0.99).ema_at(step) for step in (891, 10**6)] == [0.99, 0.99]
    assert config(ema=0.0).ema_at(5) == 0


def test_frozen_weights_stay_and_are_not_saved_again(tmp_path):
    module = model()
    module.requires_grad_(False).head.requires_grad_(True)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    task = CodesTask(4)
    final = load_file(fit(module, task, config(steps=2), tmp_path / "head", resume=False))
    changed = {name for name in before if not torch.equal(before[name], final[name])}
    assert changed == {"head.weight"}
    fit(model(), task, config(steps=2), tmp_path / "all", resume=False)
    head, all_of_it = (
        sum(path.stat().st_size for path in (tmp_path / name / "state").rglob("*.safetensors"))
        for name in ("head", "all")
    )
    assert head < all_of_it / 3


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_run_continues_as_if_unbroken(number, tmp_path, capsys):
    whole = fit(line(), LineTask(), CONFIG, tmp_path / "whole", resume=False)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(line(), LineTask(77, number), CONFIG, tmp_path / "broken", resume=False)
    assert stopped.value.args == (number,)
    messages = capsys.readouterr().err.splitlines()
    assert [each for each in messages if "stopping after this step" in each]
    assert messages[-1] == "saved after 78 steps"
    resumed = fit(line(), LineTask(), CONFIG, tmp_path / "broken", resume=True)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert_equal(load_file(resumed), load_file(whole))


def test_what_a_scheduler_sends_twice_saves_once(tmp_path):
    """It tells torchrun and each of its processes, whom torchrun tells as well."""
    task = LineTask()
    task.validate = lambda module: [signal.raise_signal(signal.SIGTERM) for _ in range(2)] and {}
    with pytest.raises(KeyboardInterrupt):
        fit(line(), task, CONFIG, tmp_path, resume=False)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["0000060"]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    task = LineTask()
    task.validate = lambda module: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        fit(line(), task, CONFIG, tmp_path, resume=False)
    assert not (tmp_path / "state").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def killed(directory: Path, config: dict, resume: bool) -> None:
    """Train in another process and kill it some time after its first saved state."""
    path = directory.with_suffix(".json")
    path.write_text(json.dumps([{"directory": str(directory), "resume": resume, **config}]))
    before = set(directory.glob("state/*"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.processes", path],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while set(directory.glob("state/[0-9]*")) <= before:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() != 0


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_run_continues_as_if_unbroken(tmp_path, times):
    settings = {"steps": 30 * times, "validate_every": 5}
    train(tmp_path / "whole", **settings)
    for i in range(times):
        killed(tmp_path / "broken", settings | {"save_minutes": 0}, resume=i > 0)  # every step
    train(tmp_path / "broken", resume=True, **settings)
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")
    assert_equal(weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole"))


def test_accumulation_changes_nothing(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "pieces", accumulation=4)
    whole, pieces = log_of(tmp_path / "whole"), log_of(tmp_path / "pieces")
    for (*row, value), (*other, expected) in zip(pieces, whole, strict=True):
        assert row == other
        assert value == pytest.approx(expected, rel=1e-4)


def test_checkpointing_computes_blocks_twice_and_the_same(tmp_path):
    passes = Counter()
    final = {}
    for checkpointing in (False, True):
        module = model()
        module.transformer.blocks[0].mlp.register_forward_pre_hook(
            lambda *_, checkpointing=checkpointing: passes.update([checkpointing])
        )
        settings = config(steps=5, checkpointing=checkpointing)
        fit(module, CodesTask(4), settings, tmp_path / str(checkpointing), resume=False)
        final[checkpointing] = module.state_dict()
    assert_equal(final[True], final[False])
    # Besides five steps, the module with the averaged weights computes one validation.
    assert passes == {False: 5 + 1, True: 2 * 5 + 1}


@pytest.mark.parametrize(("side", "window"), [(8, 2), (32, 2), (16, 1)])
def test_training_flops_are_those_that_are_computed(side, window):
    module = model()
    text, codes = torch.ones(3, 1, dtype=torch.int64), torch.zeros(3, side, side, dtype=torch.int64)
    # The counter knows no fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(text, None, codes, window).codes.sum().backward()
    expected = counter.get_total_flops() / 3
    assert training_flops(module, side * side, window) == pytest.approx(expected, rel=0.02)


def test_the_peak_is_that_of_a_matrix_product():
    matrix = torch.randn(768, 768)
    seconds = min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=20))
    ratio = peak_flops(torch.device("cpu"), torch.float32) / (2 * 768**3 / seconds)
    assert 1 / 4 < ratio < 4


def test_speeds_are_logged(tmp_path):
    started = time.perf_counter()
    train(tmp_path, steps=100, validate_every=1000)
    seconds = time.perf_counter() - started
    with open(tmp_path / "log.csv", newline="") as file:
        rows = [(int(step), name, float(value)) for step, name, value in list(csv.reader(file))[1:]]
    samples = {step: value for step, name, value in rows if name == "samples_per_second"}
    codes = {step: value for step, name, value in rows if name == "codes_per_second"}
    assert samples.keys() == codes.keys() == {50, 100}
    assert codes[50] == pytest.approx(64 * samples[50], rel=1e-4)
    assert sum(50 * 8 / value for value in samples.values()) < seconds


def test_bf16_where_it_is_native(tmp_path):
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "avx512_bf16" not in cpu.read_text():
        with pytest.raises(ValueError, match="this cpu does not support bf16 natively"):
            train(tmp_path / "bf16", precision="bf16")
        return
    assert all(
        p.dtype == torch.float32 for p in train(tmp_path / "bf16", precision="bf16").parameters()
    )
    train(tmp_path / "fp32")
    rough, fine = log_of(tmp_path / "bf16"), log_of(tmp_path / "fp32")
    for (_, name, value), (_, _, expected) in zip(rough, fine, strict=True):
        if name.endswith("loss"):
            assert 0 < abs(value - expected) < 0.02 * expected


def test_folders_are_neither_overwritten_nor_made_up(tmp_path):
    fit(line(), LineTask(), CONFIG, tmp_path, resume=False)
    with pytest.raises(FileExistsError, match="already has a training: add --resume"):
        fit(line(), LineTask(), CONFIG, tmp_path, resume=False)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        fit(line(), LineTask(), CONFIG, tmp_path / "other", resume=True)
    with pytest.raises(ValueError, match="resume with the same"):
        fit(line(), LineTask(), config(batch=5), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"0000120 does not fit this training: Size mismatch"):
        fit(nn.Linear(2, 1), LineTask(), CONFIG, tmp_path, resume=True)


def test_a_full_disk_leaves_the_state_before(tmp_path):
    """A limit on the size of files stands in for the disk."""
    resource = pytest.importorskip("resource")
    short = config(steps=2)
    fit(line(), LineTask(), short, tmp_path, resume=False)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"0000003 cannot be saved: .*File too large"):
            fit(line(), LineTask(), config(steps=3), tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    fit(line(), LineTask(), config(steps=3), tmp_path, resume=True)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["0000003"]


def test_bad_settings_are_refused():
    for bad in (
        {"steps": 0},
        {"batch": -1},
        {"learning_rate": float("nan")},
        {"accumulation": 0},
        {"precision": "fp8"},
    ):
        (name,) = bad
        with pytest.raises(ValueError, match=name):
            config(**bad)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    for bad, message in (
        ({"accumulation": 3}, "batch 4 must be a multiple of 3"),
        ({"checkpointing": True}, "checkpointing needs transformer blocks, and Linear has none"),
        ({"shard": True}, "shard needs transformer blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(line(), LineTask(), config(**bad), tmp_path, resume=False)
    assert not any(tmp_path.iterdir())


def test_a_training_that_diverges_is_not_saved(tmp_path):
    task = LineTask()
    loss = task.loss
    task.loss = lambda module, step, *piece: (
        loss(module, step, *piece)[0] * (math.inf if step == 30 else 1), {}
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="no longer finite at step 49"):
        fit(line(), task, CONFIG, tmp_path, resume=False)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0}, {"clip": 0}, {"minutes": -1}, {"warmup": -1}, {"weight_decay": -1},
        {"save_minutes": -1}, {"learning_rate": math.inf}, {"steps": 10**4000}, {"seed": -(10**30)},
        {"final_learning_rate": -3}, {"ema": 1.5}, {"ema": math.nan},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, not {reprlib.repr(value)}"):
        config(**bad)
