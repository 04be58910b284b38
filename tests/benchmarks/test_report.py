"""The measuring scripts run, and the committed tables are what the committed results say."""

import json
import subprocess
import sys

import pytest

from benchmarks.report import DOCUMENT, document
from scripts.comfyui import PACK


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
