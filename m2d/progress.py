"""Progress of long work: a bar on a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 15.0


def say(message: str) -> None:
    """Print one line to stderr; stdout is kept for results.

    A log that takes no more, as on a full disk, does not end the work.
    """
    with contextlib.suppress(OSError):
        tqdm.write(message, file=sys.stderr)


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing how far along they are and the time left.

    total: of all items, which may be more than these where an earlier run has had the first.
    """
    known = len(items) if isinstance(items, Sized) else None
    total = known if total is None else total
    before = total - known if total is not None and known is not None else 0
    if sys.stderr.isatty():
        yield from tqdm(
            items, desc=title, total=total, initial=before, file=sys.stderr, leave=False
        )
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if before + done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            each = (now - start) / done
            left = f", {duration(each * (total - before - done))} left" if total else ""
            say(f"{title}: {before + done}/{total or '?'} in {duration(now - start)}{left}")


def duration(seconds: float) -> str:
    """12.3s, 5m 10s or 3h 05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
