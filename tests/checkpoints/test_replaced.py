"""A model draws the same when its files are written again under it."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.published import write_llamagen
from tokenshuffle_core.config import GenerationConfig
from tokenshuffle_core.engine.quantize import quantize
from tokenshuffle_core.pipeline import Pipeline, load

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = GenerationConfig(width=16, height=16, any_size=True)


def checksum(pipeline: Pipeline) -> str:
    prompt = "207" if pipeline.text_tokenizer.kind == "classes" else "a red apple"
    images, codes = pipeline.generate(prompt, settings=SETTINGS)
    return hashlib.sha256(images.numpy().tobytes() + codes.numpy().tobytes()).hexdigest()


def main(folder: Path) -> None:
    """Prints a checksum for each model of a folder, drawn while its file is overwritten, and
    another one, drawn while it is cut."""
    paths = sorted(folder.iterdir())
    pipelines = [load(path) for path in paths if not path.name.startswith("vq_")]
    for size in (None, 0):
        for path in paths:
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.truncate(size)
        print(*map(checksum, pipelines))


@pytest.fixture
def models(tiny, tmp_path) -> Path:
    """Weights that need no conversion on a CPU, whole and small ones, and a pickle."""
    whole = load(tiny)
    whole.save(tmp_path / "whole.safetensors")
    quantize(whole.model, "int8")
    whole.save(tmp_path / "int8.safetensors")
    write_llamagen(tmp_path)
    return tmp_path


def test_pictures_do_not_depend_on_the_file(models):
    paths = [path for path in sorted(models.iterdir()) if not path.name.startswith("vq_")]
    expected = [checksum(load(path)) for path in paths]
    assert len(set(expected)) == 3
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.checkpoints.test_replaced", models]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [expected, expected]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
