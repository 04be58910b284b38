"""A folder that a process writes to, against other processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenshuffle_core.cli.main import main
from tokenshuffle_core.lock import NAME, is_left, lock

HOLD = "import sys, time; from pathlib import Path; from tokenshuffle_core.lock import lock\n"
HOLD += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", HOLD, tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_held_until_its_process_ends_however_it_ends(other, tmp_path):
    with pytest.raises(BlockingIOError, match=r"another process is writing to .*: wait"):
        lock(tmp_path).__enter__()
    with lock(tmp_path, rank=1):  # another share of the same work
        pass
    other.kill()
    other.wait()
    assert is_left(tmp_path)
    with lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_forked_process_does_not_hold_on_to_it(tmp_path):
    reader, writer = os.pipe()
    with lock(tmp_path):
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    with lock(tmp_path):
        pass
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_only_one_of_many_holds_it_at_a_time(tmp_path):
    """Also as the file comes and goes."""

    def work() -> None:
        done = 0
        while done < 30:
            try:
                with lock(tmp_path):
                    os.mkdir(tmp_path / "inside")  # fails if another one is
                    time.sleep(0.0005)
                    os.rmdir(tmp_path / "inside")
                    done += 1
            except BlockingIOError:
                time.sleep(0.0005)

    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            try:
                work()
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_pictures_of_two_commands_in_one_folder(other, tiny, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red apple\n")
    command = ["generate", "--prompts", tmp_path / "p.txt", "-o", tmp_path, "--model", tiny]
    assert main([*map(str, command), "--any-size", "--width", "16", "--height", "16"]) == 2
    assert "another process is writing to" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", NAME}
