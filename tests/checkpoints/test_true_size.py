"""Janus-Pro-1B at its true size, with random weights."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from scripts.comfyui import PACK

CODE = """if True:
    import json, resource, sys
    from tokenshuffle_core.cli import main
    code = main(sys.argv[1:])
    print(json.dumps({"code": code, "kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def run(*arguments) -> dict:
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    found = subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=True).stdout
    return json.loads(found.splitlines()[-1])


@pytest.mark.slow
def test_convert_and_generate_within_16_gb(tmp_path):
    make = "import sys, pathlib, benchmarks.janus as b; b.make(pathlib.Path(sys.argv[1]), 16)"
    subprocess.run([sys.executable, "-c", make, tmp_path / "janus"], cwd=PACK, check=True)
    converted, picture = tmp_path / "janus.safetensors", tmp_path / "a.png"
    found = [
        run("convert", tmp_path / "janus", "-o", converted),
        run("generate", "a red fox", "-o", picture, "--model", converted, "--device", "cpu"),
    ]
    assert all(step["code"] == 0 for step in found)
    assert Image.open(picture).size == (384, 384)
    assert max(step["kib"] for step in found) < 16 * 1024**2
