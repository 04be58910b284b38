"""A folder that a process writes to, against other processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenshuffle_core.lock import NAME, is_left, lock, remove_parts

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


def test_what_a_killed_process_left_of_its_own_files_is_removed(tmp_path):
    names = (
        ".final.safetensors.ab1.part",
        ".sheet-0000010.png.x.part",
        ".mine.txt.x.part",
        "a.part",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"")
    ours = "final.safetensors", "sheet-*.png", "codes-00012.safetensors"
    remove_parts(*(tmp_path / name for name in ours))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.txt.x.part", "a.part"]
