"""Progress of long work: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 15.0


def say(message: str) -> None:
    """Print one line to stderr; stdout is kept for results."""
    tqdm.write(message, file=sys.stderr)


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, showing how far along they are and the time left."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=title, total=total, file=sys.stderr, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if done + 1 == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = f", {(now - start) / (done + 1) * (total - done - 1):.0f}s left" if total else ""
            say(f"{title}: {done + 1}/{total or '?'} in {now - start:.1f}s{left}")
