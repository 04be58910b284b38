"""States on disk: what is read of them, damaged ones, and ones made to harm."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenshuffle_core.training import state
from tokenshuffle_core.training.settings import LoopConfig

CONFIG = LoopConfig(steps=5, batch=4, learning_rate=0.1, warmup=0, validate_every=5)
ABOUT = {"codes": "abc"}
PART = "00000.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Harm:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def tensors(fill: Callable = torch.zeros) -> dict:
    return {
        "model": {"weight": fill(3, 2), "bias": fill(3, dtype=torch.bfloat16)},
        "optimizer": {"weight": {"step": fill(()), "exp_avg": fill(3, 2)}},
        "task": {},
    }


def restore(path: Path) -> dict:
    found = tensors()
    assert state.restore(path, found, CONFIG, ABOUT) == (5, 1.5)
    return found


def refusal(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(path))) as error:
        restore(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    stored = tensors(torch.randn)
    state.save(directory, 5, 1.5, stored, CONFIG, ABOUT)
    return state.latest(directory), stored


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "state" / saved[0].name))


def test_what_is_saved_is_restored_and_holds_no_pickle(saved):
    path, stored = saved
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    torch.testing.assert_close(restore(path), stored, rtol=0, atol=0)


def test_parts_of_other_processes_are_put_together(saved, copied):
    """As three processes would have divided the rows of a tensor, with nothing for the last."""
    name = "model.weight"
    whole = load_file(copied / PART)
    with safe_open(copied / PART, framework="pt") as file:
        places = json.loads(file.metadata()[state.PLACES])
    size, _ = places.pop(name)
    weight = whole.pop(name)
    save_file(whole, copied / PART, {state.PLACES: json.dumps(places)})
    for i, rows in enumerate((weight[:2], weight[2:], weight[3:]), start=1):
        place = {name: [size, [min(2 * i - 2, 3), 0]]}
        file = copied / f"0000{i}.safetensors"
        save_file({name: rows.contiguous()}, file, {state.PLACES: json.dumps(place)})
    torch.testing.assert_close(restore(copied), saved[1], rtol=0, atol=0)
    (copied / "00001.safetensors").unlink()
    assert "does not hold all of model.weight: a file of it is missing" in refusal(copied)


def test_no_code_runs_in_whatever_file_it_is(copied, tmp_path):
    """DCP unpickles .metadata, or one for each process, and every item that is no tensor."""
    harm = pickle.dumps(Harm(tmp_path / "harmed"))
    for name in ("__0.metadata", "__0_0.distcp", "00000.pt"):
        (copied / name).write_bytes(harm)
    restore(copied)
    (copied / ".metadata").write_bytes(harm)
    assert "in a format that can run code, so it is not read" in refusal(copied)
    for name in (PART, state.SETTINGS):
        (copied / ".metadata").unlink(missing_ok=True)
        (copied / name).write_bytes(harm)
        refusal(copied)
    assert not (tmp_path / "harmed").exists()
    (copied / ".metadata").write_bytes(harm)
    with pytest.raises(dcp.api.CheckpointException):  # what would have run
        dcp.load(tensors(), checkpoint_id=copied)
    assert (tmp_path / "harmed").exists()


def test_a_state_in_the_format_before_is_refused(copied):
    (copied / PART).unlink()
    dcp.save(tensors(), checkpoint_id=copied)
    assert "start a new training with --init" in refusal(copied)


def with_places(places: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = places if isinstance(places, str) else json.dumps(places)
        save_file(load_file(path / PART), path / PART, {state.PLACES: text})

    return change


def with_settings(change: Callable[[str], str]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        file = path / state.SETTINGS
        file.write_text(change(file.read_text()))

    return write


DEEP = "[" * 200_000
DAMAGES = {
    "cut": lambda path: (path / PART).write_bytes((path / PART).read_bytes()[:-10]),
    "cut in the header": lambda path: (path / PART).write_bytes((path / PART).read_bytes()[:100]),
    "empty": lambda path: (path / PART).write_bytes(b""),
    "a folder": lambda path: ((path / PART).unlink(), (path / PART).mkdir()),
    "a pipe": lambda path: os.mkfifo(path / "00009.safetensors"),
    "missing": lambda path: (path / PART).unlink(),
    "without places": lambda path: save_file(load_file(path / PART), path / PART),
    "places that are none": with_places([1, 2]),
    "places of other tensors": with_places({"a": [[1], [0]]}),
    "places too deep": with_places(DEEP),
    "places beyond the tensor": with_places({"model.bias": [[3], [1]]}),
    "places beyond numbers": with_places({"model.bias": [[2**70], [0]]}),
    "places that are fractions": with_places({"model.bias": [[3.5], [0]]}),
    "places of another rank": with_places({"model.bias": [[3, 1], [0]]}),
    "no settings": lambda path: (path / state.SETTINGS).unlink(),
    "settings cut": with_settings(lambda text: text[: len(text) // 2]),
    "settings too deep": with_settings(lambda text: DEEP),
    "settings that are a list": with_settings(lambda text: f"[{text}]"),
    "settings without a batch": with_settings(lambda text: text.replace("batch", "lot")),
    "about a list": with_settings(lambda text: text.replace(json.dumps(ABOUT), "[1]")),
    "seconds that are none": with_settings(lambda text: text.replace("1.5", '"soon"')),
    "seconds beyond numbers": with_settings(lambda text: text.replace("1.5", "NaN")),
    "seconds too many": with_settings(lambda text: text.replace("1.5", "1" * 400)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_are_refused_in_a_sentence(copied, damage):
    if damage == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    DAMAGES[damage](copied)
    refusal(copied)


def test_other_folders_are_neither_states_nor_removed(saved, tmp_path):
    others = [tmp_path / "state" / name for name in ("0000009 copy", "9x", "7.txt")]
    for other in others:
        other.mkdir(parents=True)
    (tmp_path / "state" / "12").write_text("a file")
    assert state.latest(tmp_path) is None
    state.save(tmp_path, 6, 1.5, tensors(), CONFIG, ABOUT)
    state.save(tmp_path, 7, 1.5, tensors(), CONFIG, ABOUT)
    assert state.latest(tmp_path).name == "0000007"
    assert not (tmp_path / "state" / "0000006").exists()
    assert all(other.exists() for other in others)
