"""The same training in one process and in two, which must learn the same."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.pairs import encoded, noise, write_folder
from tests.support.processes import log_of, model, train, weights_of
from tokenshuffle_core import checkpoints
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.data.extraction import extract
from tokenshuffle_core.presets import PRESETS
from tokenshuffle_core.training import tokenizer as train_tokenizer
from tokenshuffle_core.training.distributed import process_group
from tokenshuffle_core.training.settings import LoopConfig

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun is not for Windows"),
    pytest.mark.xdist_group("distributed"),  # one worker, so that what they share is trained once
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
WAYS = {
    "ddp": {},
    "accumulated": {"accumulation": 2},
    "shard": {"shard": True},
    "shard, accumulated, checkpointing": {
        "shard": True, "accumulation": 2, "checkpointing": True,
    },
}  # fmt: skip


def torchrun(*arguments) -> str:
    """Run a module in two processes; returns what they print."""
    command = [*TORCHRUN, "2", "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_in_two(directory: Path, runs: list[dict]) -> None:
    path = directory / "runs.json"
    path.write_text(json.dumps(runs, default=str))
    torchrun("tests.support.processes", path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of trainings: "one" in one process without interruption, the others differently."""
    directory = tmp_path_factory.mktemp("runs")
    train(directory / "one")
    train(directory / "frozen", freeze=True)
    train(directory / "one, then two sharded", stop_at=6)
    train(directory / "muon", optimizer="muon")
    runs = [{"directory": directory / name, **config} for name, config in WAYS.items()]
    runs += [
        {"directory": directory / "frozen, ddp", "freeze": True},
        {"directory": directory / "frozen, shard", "freeze": True, "shard": True},
        {"directory": directory / "two, then one", "stop_at": 6},
        {"directory": directory / "two sharded, then one", "stop_at": 6, "shard": True},
        {"directory": directory / "one, then two sharded", "resume": True, "shard": True},
        {"directory": directory / "muon, ddp", "optimizer": "muon"},
        {"directory": directory / "muon, two, then one", "optimizer": "muon", "stop_at": 6},
        {"directory": directory / "minutes", "minutes": 0.03, "fast_clock": True},
    ]
    train_in_two(directory, runs)
    for name in ("two, then one", "two sharded, then one"):
        assert (directory / name / "state" / "0000007").exists()
        train(directory / name, resume=True)
    train(directory / "muon, two, then one", resume=True, optimizer="muon")
    return directory


def assert_the_same(found: Path, expected: Path) -> None:
    found_log, expected_log = log_of(found), log_of(expected)
    assert [row[:2] for row in found_log] == [row[:2] for row in expected_log]
    for (step, name, value), (_, _, other) in zip(found_log, expected_log, strict=True):
        assert value == pytest.approx(other, rel=1e-4, nan_ok=True), (step, name)
    for name, weight in weights_of(expected).items():
        torch.testing.assert_close(weights_of(found)[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_learn_what_one_does(runs, name):
    assert_the_same(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["frozen, ddp", "frozen, shard"])
def test_frozen_weights_stay_in_every_process(runs, name):
    assert_the_same(runs / name, runs / "frozen")
    first = "transformer.blocks.0.mlp.up_proj.weight"
    assert torch.equal(weights_of(runs / name)[first], model().state_dict()[first])


@pytest.mark.parametrize(
    "name", ["two, then one", "two sharded, then one", "one, then two sharded"]
)
def test_another_number_of_processes_goes_on(runs, name):
    assert_the_same(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["muon, ddp", "muon, two, then one"])
def test_muon_learns_the_same(runs, name):
    found, expected = log_of(runs / name), log_of(runs / "muon")
    for row, other in zip(found, expected, strict=True):
        assert row == (*other[:2], pytest.approx(other[2], rel=1e-3, nan_ok=True))


def test_one_clock_decides_for_all(runs):
    """Else one process would stop, and the other one wait for it."""
    settings = next((runs / "minutes" / "state").glob("*/settings.json"))
    assert json.loads(settings.read_text())["seconds"] == pytest.approx(60 * 0.03, rel=0.5)
    assert (runs / "minutes" / "final.safetensors").exists()


def test_torchrun_on_a_device_that_it_does_not_know(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with (
        pytest.raises(ValueError, match="cuda or cpu, not on mps: add --device cpu"),
        process_group(torch.device("mps")),
    ):
        pass


@pytest.mark.slow
def test_compiled_it_learns_the_same(tmp_path):
    train(tmp_path / "one")
    train(tmp_path / "compiled", compile=True)
    ways = {
        "ddp": {},
        "ddp, checkpointing": {"checkpointing": True},
        "shard, checkpointing": {"shard": True, "checkpointing": True},
    }
    runs = [{"directory": tmp_path / name, "compile": True, **way} for name, way in ways.items()]
    train_in_two(tmp_path, runs)
    for name in ("compiled", *ways):
        assert_the_same(tmp_path / name, tmp_path / "one")


@pytest.mark.slow
def test_the_command_line_in_two_processes(tiny, tmp_path, capsys):
    pairs = {f"{i}.png": (encoded(noise(32, 32, i)), [f"picture {i}"]) for i in range(8)}
    source = write_folder(tmp_path / "pictures", pairs)
    codes = tmp_path / "codes"
    extract(source, codes, checkpoints.load_image_tokenizer(tiny), [(32, 32)])
    settings = ["train", "model", codes, "--init", tiny, "--steps", "3", "--batch", "4"]
    settings += ["--text-loss", "0.1", "--device", "cpu", "-o"]
    assert main([*map(str, settings), str(tmp_path / "one")]) == 0
    two = tmp_path / "two"
    ways = ("--accumulation", "2", "--checkpointing", "--shard")
    printed = torchrun("tokenshuffle_core", *settings, two, *ways)
    assert printed.splitlines() == [str(two / "final.safetensors")]
    assert_the_same(two, tmp_path / "one")


@pytest.mark.slow
def test_the_image_tokenizer_learns_the_same_in_pieces_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "REVIVE_EVERY", 8)
    pairs = {f"{i}.png": (encoded(noise(32, 32, i)), ["noise"]) for i in range(12)}
    source = write_folder(tmp_path / "pictures", pairs)
    # Three whole pictures in the last steps, which two pieces share unevenly.
    loop = LoopConfig(40, 12, 1e-3, validate_every=40, save_minutes=1e9)

    def trained(name, loop=loop, resume=False):
        path = train_tokenizer.train_tokenizer(
            source, tmp_path / name, PRESETS["tiny"].image_tokenizer, loop,
            crop=16, side=32, resume=resume,
        )  # fmt: skip
        return load_file(path)

    whole = trained("whole")
    for name, weight in trained("pieces", replace(loop, accumulation=2)).items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)
    loss = train_tokenizer.TokenizerTask.loss

    def interrupted(self, module, step, *piece):
        if step == 13:  # between two looks for unused codes
            signal.raise_signal(signal.SIGINT)
        return loss(self, module, step, *piece)

    with monkeypatch.context() as patch:
        patch.setattr(train_tokenizer.TokenizerTask, "loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained("broken")
    resumed = trained("broken", resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
