"""Standard output and standard error, which may fail while the work goes on."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Messages:
    """A text stream that escapes what its terminal cannot show and says nothing once it failed.
    `error` is how it failed, None while it did not."""

    def __init__(self, stream):
        self.stream = stream
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    @property
    def reader_is_gone(self) -> bool:
        # Windows has no EPIPE.
        return self.error is not None and self.error.errno in (errno.EPIPE, errno.EINVAL)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _try(self, do, *arguments) -> None:
        if self.error:
            return
        try:
            do(*arguments)
        except OSError as error:
            self.error = error
            # What is still buffered would fail again when Python exits.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())


@contextmanager
def standard_streams() -> Iterator[Messages]:
    """Inside, standard output, which is yielded, and standard error are `Messages`. A process
    without them, such as a service, gets some that lead nowhere: otherwise a file that it opens
    would take the place of standard error."""
    kept = sys.stdout, sys.stderr
    streams = [Messages(stream or open(os.devnull, "w")) for stream in kept]  # noqa: SIM115
    sys.stdout, sys.stderr = streams
    try:
        yield streams[0]
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = kept
