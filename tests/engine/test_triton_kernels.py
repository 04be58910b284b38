"""The kernels compile for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_kernels_fit_a_gpu(capability, tmp_path):
    """Their tiles fit the smallest shared memory, 99 KiB, and their variables the registers;
    weights are loaded ahead, and multiplied by matrix instructions."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "tests" / "support" / "compile_kernels.py"]
    command += [str(capability), "2,64"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == 19
    for kernel in kernels:
        assert kernel["shared"] <= 99 * 1024
        assert kernel["registers"]
        if kernel["kernel"] != "_combine":
            assert kernel["products"] > 0
            assert kernel["loads ahead"] > 0
