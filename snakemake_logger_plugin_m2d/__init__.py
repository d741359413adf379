"""A logger plugin of Snakemake: one line a job, in place of pages. `snakemake --logger m2d ...`

    [12/42] measure_grid demo gld_reap   8.1 s   about 2 min left

Snakemake finds it by its name. Where a job fails, the end of its log follows.
"""

import logging
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

LINES_OF_A_LOG = 20


class LogHandler(LogHandlerBase):
    """Writes to stderr when a job ends, and what Snakemake warns of."""

    def __post_init__(self) -> None:
        self.jobs: dict[int, tuple[str, float]] = {}
        self.start = time.monotonic()
        self.done = self.total = 0
        self.counts: dict[str, int] = {}  # jobs of every rule, done or not
        self.seconds: dict[str, list[float]] = {}  # of the jobs that are done, by rule

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line of a record, if it has one."""
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self.start = time.monotonic()
            self.counts = dict(getattr(record, "stats", None) or {})
            self.total = int(self.counts.pop("total", 0))
        elif event == LogEvent.JOB_INFO:
            self.jobs[record.jobid] = (name_of(record), time.monotonic())  # type: ignore[attr-defined]
        elif event == LogEvent.JOB_FINISHED:
            self.finished(record.job_id)  # type: ignore[attr-defined]
        elif event == LogEvent.PROGRESS:
            self.done, self.total = record.done, record.total  # type: ignore[attr-defined]
        elif event == LogEvent.JOB_ERROR:
            self.failed(record)
        elif record.levelno >= logging.WARNING:
            say(record.getMessage())

    def finished(self, job: int) -> None:
        """The line of a job that is done."""
        name, since = self.jobs.pop(job, ("", time.monotonic()))
        self.done += 1
        now = time.monotonic()
        self.seconds.setdefault(name.partition(" ")[0], []).append(now - since)
        rest = "done"
        if self.total > self.done:
            left = work_left(self.counts, self.seconds) / at_once(self.seconds, now - self.start)
            # The first jobs are unlike the others, and say little.
            rest = f"about {duration(left)} left" if 10 * self.done >= self.total else ""
        self.total = max(self.total, self.done)
        place = f"[{self.done:>{len(str(self.total))}}/{self.total}]"
        say(f"{place} {name:<60} {duration(now - since):>8}   {rest}".rstrip())

    def failed(self, record: logging.LogRecord) -> None:
        """The lines of a job that failed: its name, and the end of its log."""
        name, _ = self.jobs.get(getattr(record, "jobid", -1), (getattr(record, "rule_name", ""), 0))
        say(f"FAILED {name}")
        for log in getattr(record, "log", None) or []:
            say(f"  {log}:")
            if Path(log).is_file():
                lines = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
                say("\n".join(f"    {line[:300]}" for line in lines[-LINES_OF_A_LOG:]))

    @property
    def writes_to_stream(self) -> bool:
        """To stderr, in place of Snakemake's own."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """No."""
        return False

    @property
    def has_filter(self) -> bool:
        """It takes what it wants."""
        return True

    @property
    def has_formatter(self) -> bool:
        """It formats by itself."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """No."""
        return False


def work_left(counts: dict[str, int], seconds: dict[str, list[float]]) -> float:
    """Seconds that the jobs not done would take one after the other.

    A job takes as long as its rule's others took, or as all did where its rule is new.
    """
    every = [value for values in seconds.values() for value in values]
    left = 0.0
    for rule, count in counts.items():
        known = seconds.get(rule, [])
        left += max(count - len(known), 0) * mean(known or every)
    return left


def at_once(seconds: dict[str, list[float]], elapsed: float) -> float:
    """How many jobs ran at a time; at least one."""
    return max(sum(map(sum, seconds.values())) / max(elapsed, 0.001), 1.0)


def name_of(record: logging.LogRecord) -> str:
    """The rule and its wildcards: measure_grid demo gld_reap."""
    wildcards: Any = getattr(record, "wildcards", None) or {}
    return " ".join([getattr(record, "rule_name", ""), *map(str, dict(wildcards).values())])


def duration(seconds: float) -> str:
    """8.1 s, 2 min, 3.5 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    """To stderr, at once."""
    print(text, file=sys.stderr, flush=True)
