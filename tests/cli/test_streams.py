"""Messages that cannot be printed stop no work and give the exit codes that Unix users expect."""

import io
import os
import subprocess
import sys

import pytest
from PIL import Image

from tokenshuffle_core.cli.main import main


def draw(tiny, output, count: int = 3) -> int:
    command = ["generate", "a", "--model", str(tiny), "-o", str(output), "--count", str(count)]
    return main(command)


def gone() -> io.TextIOWrapper:
    """A pipe whose reader has gone away."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", buffering=1)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", ["gone", "none", "full", "narrow"])
def test_the_work_is_done_all_the_same(name, stream, tiny, tmp_path, monkeypatch, capsys):
    if stream == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    make = {
        "gone": gone,
        "none": lambda: None,
        "full": lambda: open("/dev/full", "w"),  # noqa: SIM115
        "narrow": lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
    }
    monkeypatch.setattr(sys, name, make[stream]())
    code = draw(tiny, tmp_path / "图.png")
    # What was asked of standard output could not be written; what goes to the other is not asked.
    failed = stream == "full" and name == "stdout"
    assert code == (2 if failed else 0)
    assert len(list(tmp_path.glob("图-*.png"))) == 3
    if failed:
        assert "standard output: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix")
def test_a_process_whose_streams_are_closed(tiny, tmp_path):
    """Files that it opens would take their numbers."""
    generate = f"{sys.executable} -m tokenshuffle_core generate a --model {tiny} --count 2"
    script = f"{generate} -o {tmp_path}/a.png 2>&- >&-; echo $?"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("0\n", "")
    for path in (tmp_path / "a-1.png", tmp_path / "a-2.png"):
        with Image.open(path) as image:
            image.load()


def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", gone())
    assert main(["info", "tiny"]) == 0
