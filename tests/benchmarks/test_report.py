"""The measuring scripts run, and the committed tables are what the committed results say."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import simplear
from benchmarks.models import COSMOS, SIMPLEAR
from benchmarks.report import DOCUMENT, document
from scripts.comfyui import PACK
from tokenshuffle_core.pipeline import load


def test_the_document_is_made_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def measured(script: str, path, *options) -> list[dict]:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--device", "cpu", "--rounds", "1"]
    subprocess.run([*command, *options, "--json", path], cwd=PACK, check=True)
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_decoding_is_measured(tmp_path):
    options = ("--models", "tiny", "--windows", "1,2", "--sizes", "64")
    first, second = measured("decode", tmp_path / "decode.json", *options)
    assert (first["steps"], second["steps"]) == (16, 4)
    width, layers, hidden = 128, 2, 384
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    weights = layers * block + width + width * 16_384
    cache = 2 * layers * width * 2 * 8  # keys and values of two rows at half of the steps
    assert first["bytes"] == 4 * (weights + cache)
    for row in (first, second):
        assert min(row[key] for key in ("picture", "floor", "plain", "transformers")) > 0


@pytest.mark.slow
def test_parts_are_measured(tmp_path):
    options = ("--model", "tiny", "--file-model", "tiny", "--sizes", "32", "--large", "64")
    rows = measured("parts", tmp_path / "parts.json", *options)
    assert sum("VQ" in row["part"] for row in rows) == 4
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
@torch.inference_mode()
def test_simplear_is_measured_against_the_same_model(tmp_path):
    small = {"text_vocabulary": 400, "dim": 64, "layers": 2, "heads": 4, "hidden": 96}
    shape = replace(SIMPLEAR, **small)
    simplear.write(tmp_path / "simplear.safetensors", shape, replace(COSMOS, channels=8), 16)
    theirs, ours = simplear.theirs(shape), load(tmp_path / "simplear.safetensors").model
    text, codes = torch.randint(400, (2, 5)), torch.randint(64_000, (2, 2, 2))
    ids = torch.cat([text, 400 + codes.flatten(1)[:, :-1]], 1)
    expected = theirs(input_ids=ids).logits[:, 4:, 400:]
    actual = ours(text, torch.zeros(2, dtype=torch.int64), codes).codes[:, :, 0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    options = SimpleNamespace(small=True, lengths=[64, 128], steps=4, rounds=1)
    found = simplear.measure(options)
    assert len(found["rows"]) == 4
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in found["rows"])
    assert 0 < found["packed"] < found["weights"] < found["peak"]
