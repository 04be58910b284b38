"""A run of `gpu.sh train`, here on the CPU, and the checkpoint that it sends home in pieces."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import gpu_train, pieces
from scripts.comfyui import PACK
from tokenshuffle_core import load
from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.pictures import read
from tokenshuffle_core.engine.quantize import check_whole, quantize
from tokenshuffle_core.text_tokenizer import TextTokenizer
from tokenshuffle_core.training.loop import Task
from tokenshuffle_core.training.model import ModelTask
from tokenshuffle_core.training.settings import LoopConfig


def message_of(*arguments) -> str:
    """What the command says where it fails."""
    command = [sys.executable, "-m", "benchmarks.pieces", *map(str, arguments)]
    run = subprocess.run(command, cwd=PACK, capture_output=True, text=True)
    assert run.returncode == 1
    assert len(run.stderr.strip().splitlines()) == 1
    return run.stderr


def test_pieces_join_to_the_same_checkpoint(tiny, tmp_path):
    pieces.split(tiny, tmp_path, 40_000)
    parts = sorted(tmp_path.glob("model-*.part"))
    assert len(parts) > 2
    assert {path.stat().st_size for path in parts[:-1]} == {40_000}
    joined = tmp_path / "joined.safetensors"
    pieces.join(tmp_path, joined)
    assert joined.read_bytes() == b"".join(path.read_bytes() for path in parts)
    original, found = load_file(tiny), load_file(joined)
    assert found.keys() == original.keys()
    for name, weight in found.items():
        assert torch.equal(weight, original[name].half()), name
    assert metadata_of(joined) == metadata_of(tiny)
    # Fewer pieces later: none of the earlier ones is left.
    pieces.split(tiny, tmp_path, 10**9)
    assert [path.name for path in tmp_path.glob("model-*.part")] == ["model-0.part"]
    joined.unlink()
    command = [sys.executable, "-m", "benchmarks.pieces", tmp_path, joined]
    printed = subprocess.run(command, cwd=PACK, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(joined)
    assert joined.read_bytes() == (tmp_path / "model-0.part").read_bytes()
    assert metadata_of(joined) == metadata_of(tiny)


def metadata_of(checkpoint: Path) -> dict[str, str]:
    with safe_open(checkpoint, "pt") as file:
        return file.metadata()


def test_a_missing_or_foreign_piece_is_named(tiny, tmp_path):
    out, checkpoint = tmp_path / "out", tmp_path / "model.safetensors"
    assert "pieces.json is missing" in message_of(tmp_path, checkpoint)
    out.mkdir()
    pieces.split(tiny, out, 40_000)
    count = len(list(out.glob("*.part")))
    piece = out / "model-1.part"
    content = piece.read_bytes()
    piece.unlink()
    assert f"piece 2 of {count}, {piece}, is missing" in message_of(out, checkpoint)
    piece.write_bytes(content[::-1])
    assert f"piece 2 of {count}, {piece}, is damaged or from" in message_of(out, checkpoint)
    assert not checkpoint.exists()


def test_what_there_is_is_kept_while_it_changes(tiny, tmp_path):
    folder, out = tmp_path / "train", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    (folder / "log.csv").write_text("step,name,value\n")

    def training() -> None:
        shutil.copy(tiny, folder / "latest.safetensors")
        (folder / "sheet-0000001.png").write_bytes(b"first")
        (folder / "sheet-0000002.png").write_bytes(b"second")
        deadline = time.monotonic() + 60
        while not (out / "sheet.png").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert torch.equal(embedding(joined(out)), embedding(tiny).half())
        (folder / "log.csv").write_text("step,name,value\n1,loss,2.0\n")
        other = load(tiny)
        with torch.no_grad():
            other.model.code_embedding.weight += 1
        (folder / "latest.safetensors").unlink()
        other.save(folder / "final.safetensors")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), gpu_train.kept(folder, out):
        training()
    assert torch.equal(embedding(joined(out)), (embedding(tiny) + 1).half())
    assert (out / "sheet.png").read_bytes() == b"second"
    assert "loss" in (out / "log.csv").read_text()


def joined(out: Path) -> Path:
    pieces.join(out, out.parent / "joined.safetensors")
    return out.parent / "joined.safetensors"


def embedding(checkpoint: Path) -> torch.Tensor:
    return load_file(checkpoint)["model.code_embedding.weight"]


def test_int8_weights_are_expanded(tiny):
    whole, model = load(tiny).model, quantize(load(tiny).model, "int8")
    gpu_train.expand(model)
    check_whole(model)
    expected, found = whole.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        largest = weight.abs().amax(-1, keepdim=True) if weight.ndim == 2 else 0
        assert ((found[name] - weight).abs() <= largest / 127 * 0.501).all(), name
    changed = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert len(changed) > 10


class FailingTask(Task):
    """A line whose training fails in the way of `errors`, one after another."""

    def __init__(self, *errors: tuple[int, Exception]):
        super().__init__()
        self.errors, self.counted = list(errors), []

    def loss(self, module, step, piece, pieces):
        self.counted.append(pieces)
        if self.errors and step == self.errors[0][0]:
            raise self.errors.pop(0)[1]
        return module(torch.ones(1, 1)).square().mean(), {}

    def validate(self, module):
        return {}

    def sheet(self, module):
        return Image.new("RGB", (1, 1))

    def save(self, module, path):
        model = load(self.tiny)
        model.save(path)


def attempts(task, folder: Path, **more) -> list[LoopConfig]:
    """The settings of each attempt."""
    options = SimpleNamespace(steps=4, until=time.time(), work=folder, out=folder / "out")
    options.out.mkdir()
    module, loop, seen = torch.nn.Linear(1, 1), LoopConfig(batch=4, **more), []
    while loop:
        seen.append(loop)
        loop = gpu_train.attempt(options, module, task, loop)
    return seen


def test_a_training_goes_on_where_the_memory_is_full(tiny, tmp_path):
    full = torch.OutOfMemoryError("full")
    task = FailingTask((0, full), (2, full))
    task.tiny = tiny
    assert [loop.accumulation for loop in attempts(task, tmp_path)] == [1, 2, 4]
    assert task.counted == [1, *[2] * 5, *[4] * 16]
    assert joined(tmp_path / "out").is_file()
    task = FailingTask(*[(0, full)] * 3)
    (tmp_path / "full").mkdir()
    with pytest.raises(torch.OutOfMemoryError):
        attempts(task, tmp_path / "full")


def test_a_training_goes_on_without_what_cannot_be_compiled(tiny, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    task = FailingTask()
    task.tiny = tiny
    task.compile = lambda module, compiled: setattr(module, "forward", compiled(module.forward))
    try:
        assert [loop.compile for loop in attempts(task, tmp_path, compile=True)] == [True, False]
    finally:
        torch.compiler.set_stance("default")
    assert len(task.counted) == 1 + 4
    assert joined(tmp_path / "out").is_file()
    with pytest.raises(RuntimeError, match="not of the compiler"):
        attempts(FailingTask((0, RuntimeError("not of the compiler"))), tmp_path / "out")


def test_a_sheet_that_fails_is_not_the_end(monkeypatch):
    def failing(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(ModelTask, "sheet", failing)
    assert gpu_train.Task.sheet(object.__new__(gpu_train.Task), None).size == (1, 1)


def prepared(built: Path, folder: Path) -> None:
    gpu_train.prepare(SimpleNamespace(built=built, data=folder, compositions=60))


def test_a_prepared_data_set_shows_the_same(data, tmp_path):
    prepared(data, tmp_path)
    pairs = list(zip(read_manifest(data), read_manifest(tmp_path), strict=True))
    for before, after in pairs:
        a, b = (np.asarray(read(folder, r)) for folder, r in ((data, before), (tmp_path, after)))
        visible = a[..., 3:] > 0
        np.testing.assert_array_equal(a * visible, b * visible)
        assert before | {"image": None} == after | {"image": None}
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 4 + len({Path(before["image"]).name for before, _ in pairs})
    text = (tmp_path / gpu_train.TEXT_TOKENIZER).read_text(encoding="utf-8")
    tokenizer = TextTokenizer.from_json(text)
    assert len(tokenizer.encode("a red apple, 3d style")) < 9  # whole words
    assert tokenizer.frame([], 128, 128)


class Run:
    """`gpu.sh` in a folder with a data set of nine pictures."""

    def __init__(self, data: Path, folder: Path):
        self.folder, self.out = folder, folder / "out"
        prepared(data, folder / "run" / "data")

    def start(self, step: str, **more) -> subprocess.Popen:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = {"RUN": self.folder / "run", "OUT": self.out, "DEVICE": "cpu", "SMALL": 1}
        settings |= {"COMPOSITIONS": 60, "PATH": path, "OMP_NUM_THREADS": 1} | more
        command = ["bash", str(PACK / "benchmarks" / "gpu.sh"), step]
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        return subprocess.Popen(command, env=environment, start_new_session=True)

    def __call__(self, step: str, **more) -> None:
        assert self.start(step, **more).wait() == 0


@pytest.mark.slow
def test_a_run_leaves_a_model_and_goes_on_from_it(data, tmp_path):
    run = Run(data, tmp_path)
    run("train", STEPS=4)
    files = list(run.out.iterdir())
    assert {path.name for path in files} == {
        "model-0.part", "pieces.json", "log.csv", "sheet.png", "train.log",
    }  # fmt: skip
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    run("join")
    first = load(run.out / "model.safetensors")
    assert first.config.model.windows == (4,)
    assert first.config.model.window_head == 32
    text_tokenizer = tmp_path / "run" / "data" / gpu_train.TEXT_TOKENIZER
    expected = TextTokenizer.from_json(text_tokenizer.read_text(encoding="utf-8"))
    assert first.text_tokenizer.encode("a red apple") == expected.encode("a red apple")
    shutil.copy(run.out / "model.safetensors", tmp_path / "first.safetensors")
    first_again = load(tmp_path / "first.safetensors")
    quantize(first_again.model, "int8")
    first_again.save(tmp_path / "int8.safetensors")
    run("train", STEPS=2, INIT=tmp_path / "int8.safetensors")
    run("join")
    second = load(run.out / "model.safetensors")
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    differences = [(a - b).abs().max().item() for a, b in pairs]
    assert 0 < max(differences) < 0.1  # it went on, and was not drawn anew


@pytest.mark.slow
def test_a_run_by_the_clock_that_is_killed_leaves_what_it_has(data, tmp_path):
    run = Run(data, tmp_path)
    process = run.start("train", SECONDS_IN_ALL=120)
    deadline = time.monotonic() + 500
    while not (run.out / "pieces.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pieces.join(run.out, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").config.generation.width == 64
