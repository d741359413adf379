"""Kills at file-system events: each stage dies at its n-th one, and is started again.

A child runs a command and kills itself (SIGKILL) just before its n-th rename, new folder, opening
for writing or removal. Then the same command must end well, give the same files as a run that was
not killed, and leave nothing else behind.

`python -m tests.kills [KILLS]`, or `make kills`, prints the kills by stage, and what was lost.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from m2d import cli
from m2d.sealed import digest_of_record
from tests.fuzz_inputs import CHOSEN, DISTILL, METHODS, TABLES, make_sound, tokenize

EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree", "open")
STAGES: dict[str, tuple[str, ...]] = {
    "tokenize": tokenize("text.jsonl"),
    "stats": ("stats", "T", "out", "--tokens", "tokens"),
    "gram": ("gram", "T", "out", "--tokens", "tokens"),
    "neurons": ("neurons", "T", "out", "--tokens", "tokens"),
    "combine": ("combine", "out", "share1", "share2"),
    "rank": ("rank", "out", *CHOSEN[:4], "--scoring", "reap"),
    "grid": ("grid", "T", "out", *CHOSEN, "--tokens", "tokens", "--keeps", "2"),
    "merge": ("merge", "T", "out", *CHOSEN, *METHODS),
    "convert": ("convert", "T", "out", "--tokens", "tokens", "--refit", "layer"),
    "perplexity": ("perplexity", "S", "--tokens", "tokens", "--out", "out"),
    "teacher-logits": ("teacher-logits", "T", "out", "--tokens", "tokens", "--rows", "1"),
    "distill": (*DISTILL, "--checkpoint-minutes", "0"),
    "tables": ("tables", "out", *TABLES),
    "fold": ("fold", "T", "out", "--tokens", "tokens"),
    "refit": ("refit", "S", "T", "out", "--tokens", "tokens"),
    "align": ("align", "S", "T", "out", "--tokens", "tokens", "--steps", "2"),
    "baseline": ("baseline", "T", "out", "--kind", "random_ffn"),
    "prune": ("prune", "S", "out", "--layers", "1", "--hidden-size", "32", "--heads", "4",
              "--kv-heads", "2", "--intermediate-size", "8", "--tokens", "tokens"),
}  # fmt: skip
# What tells the time, and, in m2d.json, the digests of a file that does and of the record itself;
# both are compared without their times, and the record's digest with the record.
TIMES = (
    "seconds", "tokens_per_second", "made_s", "measured_s", "metrics.jsonl", "record_sha256"
)  # fmt: skip
# What a run removes last, and the next one of that name removes or goes on from.
WORK = re.compile(r"\.out\.(?:layers|checkpoints)-")


def child(command: tuple[str, ...], place: Path, die_at: int | None) -> tuple[int, int]:
    """Run a command in a child; its exit code, and the file-system events that it came to."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            os.chdir(place)
            log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            count = itertools.count(1)
            here = str(place)

            def hook(event: str, values: tuple[Any, ...]) -> None:
                if event not in EVENTS:
                    return
                if event == "open" and not (
                    isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
                ):
                    return
                name = values[0] if isinstance(values[0], str | os.PathLike) else ""
                if not os.path.abspath(os.fspath(name)).startswith(here):  # noqa: PTH100
                    return
                number = next(count)
                if number == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.pwrite(counter, number.to_bytes(4, "little"), 0)

            counter = os.open(place.parent / "counter", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            sys.addaudithook(hook)
            code = cli.main(list(command))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    counted = (place.parent / "counter").read_bytes()
    return os.waitstatus_to_exitcode(status), int.from_bytes(counted, "little")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def content_of(file: Path) -> str:
    """What must be the same after a kill: the bytes, but for how long things took."""
    if file.name == "metrics.jsonl":
        lines = file.read_text().splitlines()
        return json.dumps([without_times(json.loads(line)) for line in lines])
    if file.name == "m2d.json":
        record = json.loads(file.read_text())
        sealed = record.get("record_sha256") == digest_of_record(record)
        return json.dumps([sealed, without_times(record)])
    if file.read_bytes()[:4] == b"PAR1":
        import pyarrow.parquet as pq

        return json.dumps(without_times(pq.read_table(file).to_pylist()), default=str)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def state(place: Path) -> dict[str, str]:
    """Every file of the run, hidden ones too, but the log."""
    return {
        str(file.relative_to(place)): content_of(file)
        for file in sorted(place.rglob("*"))
        if file.is_file() and file.name != "log"
    }


def fresh(sound: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)


def kill_at(stage: str, event: int, sound: Path, place: Path, expected: dict[str, str]) -> str:
    """Kill a stage at an event and start it again; what is wrong then, or nothing."""
    fresh(sound, place)
    code, _ = child(STAGES[stage], place, event)
    if code == 0:
        return ""  # it came to fewer events this time
    if code != -signal.SIGKILL:
        return f"exit code {code} instead of a kill"
    code, _ = child(STAGES[stage], place, None)
    log = (place / "log").read_text()
    if code == 2 and "exists already" in log:
        # Killed after its output was there: that must be whole, with nothing but WORK beside it.
        found = {name: part for name, part in state(place).items() if not WORK.match(name)}
        return "" if found == expected else "an output that is there and not whole"
    if code:
        return f"exit code {code} when started again: {(place / 'log').read_text()[-300:]}"
    found = state(place)
    wrong = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    return f"other files than without a kill: {', '.join(wrong[:5])}" if wrong else ""


def kills(number: int, folder: Path) -> Iterator[tuple[str, int, str]]:
    """Kills spread over the events of all stages: stage, event, what was wrong."""
    sound, place, back = folder / "sound", folder / "run", Path.cwd()
    sound.mkdir()
    try:
        make_sound(sound)
    finally:
        os.chdir(back)
    whole = {}
    for stage, command in STAGES.items():
        fresh(sound, place)
        code, events = child(command, place, None)
        if code:
            raise RuntimeError(f"{stage} fails: {(place / 'log').read_text()[-2000:]}")
        whole[stage] = (events, state(place))
    total = sum(events for events, _ in whole.values())
    for stage, (events, expected) in whole.items():
        share = min(events, max(1, round(number * events / total)))
        for i in range(share):
            event = 1 + i * events // share
            yield stage, event, kill_at(stage, event, sound, place, expected)


def main() -> int:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 700
    torch.set_num_threads(1)
    done: Counter[str] = Counter()
    lost = []
    with tempfile.TemporaryDirectory(prefix="m2d-kills-") as folder:
        for stage, event, wrong in kills(number, Path(folder)):
            done[stage] += 1
            if wrong:
                lost.append(f"{stage}, event {event}: {wrong}")
            if done.total() % 50 == 0:
                print(f"{done.total()} kills, {len(lost)} lost", file=sys.stderr)
    for line in lost:
        print(line)
    print(", ".join(f"{stage} {count}" for stage, count in done.items()))
    print(f"{done.total()} kills, {len(lost)} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
