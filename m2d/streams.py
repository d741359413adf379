"""Standard streams that are closed, full, of another encoding, or a pipe that nobody reads."""

import contextlib
import os
import select
import sys


def prepare_streams() -> None:
    """Open what is closed, and let every character be written, escaped where need be.

    Without it, the first file that is opened has the number of a closed stream, and gets what
    libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def nobody_reads() -> bool:
    """Whether standard output or error is a pipe whose reader is gone, as after `| head -1`."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence() -> None:
    """Write no more: what is still buffered would fail again when the process ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(null, number)
            with contextlib.suppress(OSError):
                stream.flush()
    os.close(null)
