"""One process at a time in a folder that is written to."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = ".tokenshuffle.lock"


@contextmanager
def lock(directory: Path, rank: int = 0) -> Iterator[None]:
    """Holds `directory`, for one of the processes that share it by their rank.

    The operating system frees it when this process ends, however it ends. Where the file system has
    no locks, nothing is held. Raises BlockingIOError where another process holds it.
    """
    path = directory / (f"{NAME}-{rank}" if rank else NAME)
    while True:
        file = open(path, "ab")  # noqa: SIM115
        try:
            _lock(file)
        except OSError as error:
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise BlockingIOError(
                    f"another process is writing to {directory}: wait for it, or choose another "
                    "folder"
                ) from None
            yield
            return
        # The one that held it may have removed the file after this one opened it; Windows does not
        # remove open files.
        with suppress(FileNotFoundError):
            if os.name == "nt" or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    try:
        yield
    finally:
        if os.name == "nt":
            file.close()
        with suppress(OSError):
            path.unlink()
        file.close()


def is_left(directory: Path) -> bool:
    """Whether a process that wrote there was killed, or still writes there."""
    return any(directory.glob(f"{NAME}*"))


if os.name == "nt":
    import msvcrt

    def _lock(file) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file) -> None:
        # Not flock, which the processes that this one forks would hold as well.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
