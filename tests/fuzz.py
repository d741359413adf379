"""Hostile files for every command: mutations of sound ones, and what comes of them.

A case is a sound input, a mutation of one of its files, and a command. Each runs in a child of this
process, with a limit of time and memory. Good are: an error in one short line with exit code 2, and
exit code 0 with outputs that hold no NaN. Everything else is a fault: a traceback, a hang, a crash,
an error of many lines, a number that is not finite.

`python -m tests.fuzz [CASES] [SEED]`, or `make fuzz`, prints the classes and each fault's case.
"""

import contextlib
import faulthandler
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from m2d import cli
from tests.fuzz_inputs import FURTHER, FURTHER_FROM, READERS, make_sound
from tests.fuzz_mutations import MUTATIONS, OFTEN

SECONDS = 60


LONGEST_LINE = 700


ERROR = re.compile(r"m2d( [\w-]+)?: error: ")


@dataclass(frozen=True)
class Case:
    """A command, the file of the sound inputs that is damaged, and how."""

    command: tuple[str, ...]
    file: str
    mutation: str
    seed: int

    def __str__(self) -> str:
        return f"{self.mutation}({self.file}, {self.seed}): m2d {' '.join(self.command)}"


def make_case(seed: int) -> Case:
    chance = random.Random(seed)
    readers = READERS + FURTHER if seed >= FURTHER_FROM else READERS
    file, command = chance.choice(readers)
    return Case(command, file, chance.choice(OFTEN), seed)


def outcome(case: Case, sound: Path, place: Path) -> tuple[str, str]:
    """The class of what came of a case, and what was printed."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    MUTATIONS[case.mutation](place / case.file, random.Random(case.seed))
    return outcome_of(case.command, place)


def outcome_of(command: Sequence[str], place: Path) -> tuple[str, str]:
    """The class of what came of a command, run in a folder, and what was printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        child = os.fork()
        if not child:
            in_child(command, place, printed)
        ended = wait_for(child)
        printed.seek(0)
        text = printed.read()
    if not ended[0]:
        return "HANG", text
    code = os.waitstatus_to_exitcode(ended[1])
    if code < 0:
        return "CRASH", f"signal {-code}\n{text}"
    if code == 2:
        lines = [line for line in text.strip().splitlines() if ERROR.match(line)]
        if len(lines) != 1 or len(lines[0]) > LONGEST_LINE:
            return "LINES", text
        return ("left over" if left_over(place) else "one line"), text
    # 1: what verify looked at is not as it was written; what doctor looked at lacks something.
    if code and not (code == 1 and command[0] in ("doctor", "verify") and "Traceb" not in text):
        return "TRACEBACK", text
    return ("NOT FINITE" if not_finite(place) else "taken"), text


def wait_for(child: int) -> tuple[int, int]:
    """What waitpid says of a child that ended; (0, 0) of one that hung, which is killed.

    It hangs when it has computed for SECONDS, or has not computed for as long. A busy machine
    makes neither happen.
    """
    ticks = os.sysconf("SC_CLK_TCK")
    used, since = -1.0, time.monotonic()
    while True:
        ended = os.waitpid(child, os.WNOHANG)
        if ended[0]:
            return ended
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        now, waits = (int(fields[11]) + int(fields[12])) / ticks, fields[0] != "R"
        if now > used or not waits:
            used, since = now, time.monotonic()
        if now > SECONDS or time.monotonic() - since > SECONDS:
            os.kill(child, signal.SIGUSR1)  # in_child: where it is
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 0, 0
        time.sleep(0.01)


def in_child(command: Sequence[str], place: Path, printed: Any) -> None:
    """Run the command in this process, which ends."""
    code = 70
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
        faulthandler.register(signal.SIGUSR1, file=printed, all_threads=True)
        sys.stdout = sys.stderr = os.fdopen(2, "w", errors="replace", closefd=False)
        memory = 16 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        os.chdir(place)
        code = cli.main(list(command))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code or 0)


def left_over(place: Path) -> bool:
    """Whether a refused command left an output, or a part of one."""
    return (place / "out").exists() or any(place.glob(".out*"))


def not_finite(place: Path) -> bool:
    """Whether an output holds a number that is not finite."""
    out = place / "out"
    for file in [out, *out.rglob("*")] if out.is_dir() else [out] if out.exists() else []:
        if not file.is_file():
            continue
        head = file.read_bytes()[:9]
        if head[:4] == b"PAR1":
            for column in pq.read_table(file).columns:
                if pa.types.is_floating(column.type):
                    values = column.to_numpy()[column.is_valid().to_numpy()]
                    if not np.isfinite(values).all():
                        return True
        elif head[8:9] == b"{":
            from safetensors.torch import load_file as load

            for name, tensor in load(file).items():
                # What is carried over from beside the text model may hold infinities.
                bad = torch.isnan if "visual" in name else lambda x: ~torch.isfinite(x)
                if tensor.is_floating_point() and bad(tensor.float()).any():
                    return True
        elif file.suffix == ".json" or head[:1] == b"{":
            text = file.read_text(errors="replace")
            if "NaN" in text or "Infinity" in text:
                return True
    return False


FAULTS = ("TRACEBACK", "HANG", "CRASH", "LINES", "NOT FINITE", "left over")


def fuzz(seeds: Sequence[int], folder: Path) -> tuple[Counter[str], list[tuple[Case, str, str]]]:
    """The classes of these cases, and every fault's case, class and output."""
    sound = folder / "sound"
    sound.mkdir()
    back = Path.cwd()
    try:
        make_sound(sound)
    finally:
        os.chdir(back)
    classes: Counter[str] = Counter()
    faults = []
    for seed in seeds:
        case = make_case(seed)
        kind, text = outcome(case, sound, folder / "case")
        classes[kind] += 1
        if kind in FAULTS:
            faults.append((case, kind, text))
            print(f"{kind}: {case}", file=sys.stderr)
        if sum(classes.values()) % 100 == 0:
            print(f"{sum(classes.values())} of {len(seeds)}: {dict(classes)}", file=sys.stderr)
    return classes, faults


def main() -> int:
    cases, seed = map(int, (sys.argv[1:] + ["3000", "900000"][len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="m2d-fuzz-") as folder:
        classes, faults = fuzz(range(seed, seed + cases), Path(folder))
    for case, kind, text in faults:
        print(f"\n{kind}: {case}\n" + "\n".join(text.strip().splitlines()[-12:]))
    print()
    for kind, count in classes.most_common():
        print(f"{count:6d}  {kind}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
