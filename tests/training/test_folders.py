"""What a training does to the folder that it writes to."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.support.processes import train
from tokenshuffle_core.cli.main import main
from tokenshuffle_core.lock import lock

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = {"steps": 2, "validate_every": 2}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_training_without_its_state_is_not_replaced(tmp_path):
    train(tmp_path, **SHORT)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    shutil.rmtree(tmp_path / "state")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"final\.safetensors would be replaced"):
        train(tmp_path, **SHORT)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(tmp_path, resume=True, **SHORT)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["final.safetensors", "latest.safetensors", "log.csv"])
def test_files_of_others_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("date,what\n1,mine\n")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"{name} would be replaced"):
        train(tmp_path, **SHORT)
    assert contents(tmp_path) == before


def test_a_training_that_was_killed_before_it_saved_begins_again(tmp_path):
    """And what it left half written is removed, but not what others did."""
    (tmp_path / "log.csv").write_text("step,name,value\n50,loss,")
    (tmp_path / "state" / ".unfinished").mkdir(parents=True)
    names = [".final.safetensors.x.part", ".sheet-0000002.png.x.part", ".latest.safetensors.x.part"]
    for name in [*names, ".mine.png.x.part"]:
        (tmp_path / name).write_bytes(b"half")
    train(tmp_path, **SHORT)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == [".mine.png.x.part"]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["0000002"]
    assert (tmp_path / "log.csv").read_text().startswith("step,name,value\n2,")


@pytest.fixture
def held(tmp_path):
    """A folder that another process writes to."""
    if not hasattr(os, "fork"):
        pytest.skip("Windows does not fork")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with lock(tmp_path):
            os.write(writer, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    yield tmp_path
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def test_two_trainings_in_one_folder(held, codes, image_tokenizer, capsys):
    before = contents(held)
    with pytest.raises(BlockingIOError, match="another process is writing to"):
        train(held, **SHORT)
    recipe = held.with_name("recipe.toml")
    lines = [f"image_tokenizer = {str(image_tokenizer)!r}", "[[stage]]", f"codes = {str(codes)!r}"]
    recipe.write_text("\n".join(['preset = "tiny"', *lines, "steps = 2"]))
    assert main(["train", "stages", str(recipe), "-o", str(held)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another process is writing to" in line
    assert contents(held) == before


def test_sigterm_stops_the_command_and_saves(codes, image_tokenizer, tmp_path):
    """As a scheduler stops it, in a process of its own."""
    out = tmp_path / "run"
    arguments = ["train", "model", codes, "-o", out, "--image-tokenizer", image_tokenizer]
    arguments += ["--preset", "tiny", "--batch", "2", "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenshuffle_core", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not (out / "log.csv").exists() or "loss" not in (out / "log.csv").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    errors = process.communicate()[1].splitlines()
    assert time.monotonic() - started < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert errors[-1] == "interrupted"
    (state,) = (out / "state").iterdir()
    assert f"saved after {int(state.name)} steps" in errors
    assert (out / "latest.safetensors").exists()


def test_weights_of_others_among_stages(codes, image_tokenizer, tmp_path, capsys):
    (tmp_path / "run" / "1").mkdir(parents=True)
    save_file({}, tmp_path / "run" / "1" / "latest.safetensors")
    recipe = tmp_path / "recipe.toml"
    lines = [f"image_tokenizer = {str(image_tokenizer)!r}", "[[stage]]", f"codes = {str(codes)!r}"]
    recipe.write_text("\n".join(['preset = "tiny"', *lines, "steps = 2"]))
    assert main(["train", "stages", str(recipe), "-o", str(tmp_path / "run")]) == 2
    assert "latest.safetensors would be replaced" in capsys.readouterr().err
