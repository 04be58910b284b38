"""The check of a borrowed GPU runs, here on the CPU, and writes down what it found."""

import json
import subprocess
import sys
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from scripts.comfyui import PACK
from tokenshuffle_core.image_tokenizer import ImageTokenizer


@pytest.mark.slow
def test_the_check_writes_what_it_found(tmp_path):
    path = tmp_path / "check.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--small"]
    subprocess.run([*command, "--json", path], cwd=PACK, check=True)
    found = json.loads(path.read_text())
    assert found["about"]["torch"] == torch.__version__
    bundled, simplear = found["codes"]
    assert bundled["codes"] == (64 // 8) ** 2  # of 8 pixels
    assert simplear["codes"] == (64 // 16) ** 2
    for codes in (bundled, simplear):
        assert codes["equal"] == 1
        assert codes["all_equal"] is True
    rows = found["image_tokenizers"]
    assert [(row["image_tokenizer"], row["pixels"]) for row in rows] == [
        ("bundled", 32), ("bundled", 64), ("VQ-16", 32), ("VQ-16", 64), ("Cosmos", 32),
        ("Cosmos", 64),
    ]  # fmt: skip
    for row in rows[::2]:  # the CPU against itself
        assert row["largest_difference"] == 0
        assert row["equal_codes"] == 1
    assert all(row[part]["seconds"] > 0 for row in rows for part in ("decode", "encode"))
    steps = [tuple(row[k] for k in ("window", "weights", "steps")) for row in found["decoding"]]
    assert steps == [(1, None, 16), (1, None, 16), (2, "int4", 16)]
    for row in found["decoding"]:
        assert row["step"] == row["picture"] / row["steps"]
        # How long a few megabytes take to read is mostly how long a CPU's threads take to wake up,
        # so it says nothing of the step.
        assert row["floor"] > 0
    assert found["memory"][0]["pictures"] == 4
    (tests,) = found["tests"]
    assert tests["returncode"] == 0
    assert "passed" in tests["summary"] or "skipped" in tests["summary"]


def test_other_codes_and_failures_are_reported(tmp_path, monkeypatch):
    """What a part had is written before it fails, and the next one still runs."""
    greedy = cycle((torch.zeros(1, 2, 2), torch.tensor([[[0.0, 0], [1, 0]]])))
    monkeypatch.setattr(gpu_check, "greedy_codes", lambda *_: next(greedy))
    path = tmp_path / "check.json"

    def failing(options):
        yield {"a": 1}
        raise RuntimeError("no kernel image")

    def last(options):
        yield {"so far": json.loads(options.json.read_text())["decoding"]}

    monkeypatch.setattr(gpu_check, "image_tokenizers", lambda options: ())
    monkeypatch.setattr(gpu_check, "decoding", failing)
    monkeypatch.setattr(gpu_check, "memory", lambda options: ())
    monkeypatch.setattr(gpu_check, "gpu_tests", last)
    arguments = ["gpu_check", "--device", "cpu", "--small", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code  # a failure
    found = json.loads(path.read_text())
    assert found["codes"][0]["equal"] == 0.75
    assert found["codes"][0]["all_equal"] is False
    assert found["decoding"][0] == {"a": 1}
    assert "no kernel image" in found["decoding"][1]["error"]
    assert found["tests"] == [{"so far": found["decoding"]}]


def test_a_picture_that_differs_is_measured(monkeypatch):
    """Weights that change on the way to the device show in the difference from the CPU."""
    options = SimpleNamespace(small=True, device="cpu")
    to = ImageTokenizer.to

    def wrong(module, device):
        with torch.no_grad():
            module.decoder.conv_out.bias += 0.1
        return to(module, device)

    monkeypatch.setattr(ImageTokenizer, "to", wrong)
    first = next(gpu_check.image_tokenizers(options))
    assert first["largest_difference"] == pytest.approx(0.05, abs=0.005)
    assert first["equal_codes"] == 1  # the encoder is as it was
