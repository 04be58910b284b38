import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tokenshuffle_core import stopping
from tokenshuffle_core.stopping import SIGNALS, handled, interruptible

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("number", SIGNALS)
def test_each_of_them_is_ctrl_c(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt) as stopped, interruptible():
        signal.raise_signal(number)
    assert stopped.value.args == (number,)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "watch" not in str(threading.enumerate())


def test_what_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_code_that_saves_is_given_its_time(monkeypatch):
    """Longer than what is given to a command, in which a signal before does not count either."""
    monkeypatch.setattr(stopping, "GRACE", 0.05)
    seen = []
    with interruptible(), handled(lambda number, _: seen.append(number)):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert seen == [signal.SIGTERM]


def test_another_thread_gets_no_signals():
    def work():
        with interruptible(), handled(print):
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_signal_to_a_forked_process_is_not_its_parents(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE", 0.05)
    with interruptible():
        child = os.fork()
        if not child:
            _terminate()
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.3)


ONE_LONG_OPERATION = """
import os
from concurrent.futures import ProcessPoolExecutor
import torch
from tokenshuffle_core import stopping
stopping.GRACE = 0.5
with stopping.interruptible():
    print(ProcessPoolExecutor(1).submit(os.getpid).result(), flush=True)
    matrix = torch.zeros(12000, 12000)
    print("begun", flush=True)
    matrix @ matrix
    print("done", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its signals")
def test_an_operation_that_goes_on_for_minutes_is_cut_off():
    """And the processes that it started end, too."""
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_LONG_OPERATION], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    child = int(process.stdout.readline())
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.communicate()[0] == ""  # it was not done
    assert time.monotonic() - started < 10
    assert process.returncode == 128 + signal.SIGTERM
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
