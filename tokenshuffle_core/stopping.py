"""SIGTERM, which schedulers send, and SIGHUP, of a terminal that is closed, as Ctrl-C."""

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # SIGBREAK is Ctrl-Break on Windows
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
GRACE = 5.0  # seconds


@contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Within it, handler(number, frame) is called for these signals, but for those that are
    ignored, as under nohup. In a thread other than the main one, which gets no signals, nothing
    changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: kept for n, kept in before.items() if kept not in (signal.SIG_IGN, None)}
    wakeup = signal.set_wakeup_fd(-1)
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)
        signal.set_wakeup_fd(wakeup)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it, these signals raise KeyboardInterrupt, whose argument is the number.

    Python does so between two operations of the main thread. Where one takes longer than GRACE,
    such as attention over a huge picture, a thread ends the process: files are written whole or not
    at all, so nothing is lost that is finished. Code that needs time to save, such as a training,
    uses `handled` instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inner, outer = socket.socketpair()
    ended = threading.Event()
    inner.setblocking(False)

    def watch() -> None:
        while number := outer.recv(1):
            if number[0] in SIGNALS:
                if not ended.wait(GRACE):
                    for child in multiprocessing.active_children():
                        child.kill()
                    with suppress(OSError):
                        os.write(2, b"interrupted\n")  # standard error; print may wait for a lock
                    os._exit(128 + number[0])
                return

    watcher = threading.Thread(target=watch, daemon=True)
    with inner, outer, handled(_raise):
        signal.set_wakeup_fd(inner.fileno(), warn_on_full_buffer=False)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            signal.set_wakeup_fd(-1)
            inner.shutdown(socket.SHUT_RDWR)
            watcher.join()


def _raise(number: int, _) -> None:
    raise KeyboardInterrupt(number)


def _forget() -> None:
    """In a forked process: a signal to it is not one to its parent."""
    for number in SIGNALS:
        if signal.getsignal(number) is _raise:
            signal.set_wakeup_fd(-1)
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
