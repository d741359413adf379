"""What the operating system does to each stage: disks that are full, limits, signals, no HOME.

Each stage runs in a fresh process under each fault. Good are the whole output with exit code 0, and
one line with exit code 2 (130 and 143 for signals) with no part of an output. In both cases the
same command, without the fault, must end well afterwards, with the output of an undisturbed run.

`python -m tests.faults [FAULT ...]`, or `make faults`, prints the classes and each fault. Those
that need mounts or another user run for root alone.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz_inputs import make_sound
from tests.kills import STAGES, state

# The package need not be installed for the other user, nor for a folder that is gone.
MAIN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from m2d.cli import main; sys.exit(main())"
ROOT = Path(__file__).parents[1]


@dataclass
class Fault:
    """How a process is started, and what may come of it."""

    before: Callable[[], None] | None = None  # in the child, before it is m2d
    around: Callable[[Path, ExitStack], None] | None = None  # here, while it runs
    prefix: tuple[str, ...] = ()
    code: str = ""  # run in the child's Python first
    environment: dict[str, str | None] = field(default_factory=dict)
    streams: dict[str, object] = field(default_factory=dict)
    kill: int | None = None  # a signal in the middle
    codes: tuple[int, ...] = (0, 2)


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


def mounted(options: str, then: str = "") -> Callable[[Path, ExitStack], None]:
    """A small file system over the run's folder `here`, into which `out` goes."""

    def mount(place: Path, stack: ExitStack) -> None:
        here = place / "here"
        here.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", here], check=True)
        stack.callback(subprocess.run, ["umount", here], check=True)
        if then:
            subprocess.run(["mount", "-o", then, here], check=True)

    return mount


# Root may read and write everything; without these it is like any other user of its files.
PLAIN_USER = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def unreadable(place: Path, _: ExitStack) -> None:
    for file in place.rglob("*"):
        if file.is_file():
            file.chmod(0)


def read_only(place: Path, _: ExitStack) -> None:
    place.chmod(0o555)


def close(*streams: int) -> Callable[[], None]:
    return lambda: [os.close(stream) for stream in streams] and None


BACKWARDS = """
import time
clock, count = time.time, iter(range(1, 10**9))
time.time = lambda: clock() - 3600 * next(count)
"""
GONE = "import os, tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)\n"

FAULTS: dict[str, Fault] = {
    "full disk": Fault(around=mounted("size=4k")),
    "fuller disk": Fault(around=mounted("size=64k")),
    "no inodes": Fault(around=mounted("size=1m,nr_inodes=4")),
    "read-only disk": Fault(around=mounted("size=1m", "remount,ro"), codes=(2,)),
    "read-only output": Fault(prefix=PLAIN_USER, around=read_only, codes=(2,)),
    "unreadable inputs": Fault(prefix=PLAIN_USER, around=unreadable, codes=(2,)),
    "read-only TMPDIR": Fault(environment={"TMPDIR": "/proc"}),
    "RLIMIT_AS": Fault(before=limit(resource.RLIMIT_AS, 2 * 2**30)),
    "less RLIMIT_AS": Fault(before=limit(resource.RLIMIT_AS, 600 * 2**20)),
    "RLIMIT_NOFILE": Fault(before=limit(resource.RLIMIT_NOFILE, 24)),
    "less RLIMIT_NOFILE": Fault(before=limit(resource.RLIMIT_NOFILE, 8)),
    "RLIMIT_FSIZE": Fault(before=limit(resource.RLIMIT_FSIZE, 3000)),
    "RLIMIT_NPROC": Fault(before=limit(resource.RLIMIT_NPROC, 1)),
    "closed stdout": Fault(before=close(1), codes=(0,)),
    "closed stderr": Fault(before=close(2), codes=(0,)),
    "closed streams": Fault(before=close(0, 1, 2), codes=(0,)),
    "full stdout": Fault(streams={"stdout": "/dev/full"}),
    "full stderr": Fault(streams={"stderr": "/dev/full"}),
    "broken pipe": Fault(streams={"stdout": "pipe", "stderr": "pipe"}),
    "SIGINT": Fault(kill=signal.SIGINT, codes=(0, 130)),
    "SIGTERM": Fault(kill=signal.SIGTERM, codes=(0, 143)),
    "SIGHUP": Fault(kill=signal.SIGHUP, codes=(0, 129, -signal.SIGHUP)),
    "clock backwards": Fault(code=BACKWARDS, codes=(0,)),
    "no HOME": Fault(environment={"HOME": None}, codes=(0,)),
    "read-only HOME": Fault(environment={"HOME": "/proc"}, codes=(0,)),
    "ASCII": Fault(
        environment={"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        codes=(0,),
    ),
    "folder that is gone": Fault(code=GONE),
}
NEEDS_ROOT = ("full disk", "fuller disk", "no inodes", "read-only disk", "read-only output",
              "unreadable inputs", "RLIMIT_NPROC")  # fmt: skip


def start(words: list[str], fault: Fault, place: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    for key, value in fault.environment.items():
        environment.pop(key, None)
        if value is not None:
            environment[key] = value
    streams: dict[str, object] = {}
    for name in ("stdout", "stderr"):
        where = fault.streams.get(name, str(log))
        if where == "pipe":
            read, streams[name] = os.pipe()
            os.close(read)
        else:
            streams[name] = os.open(str(where), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    process = subprocess.Popen(
        [*fault.prefix, sys.executable, "-c", fault.code + MAIN, str(ROOT), *words],
        cwd=place, env=environment, preexec_fn=fault.before, stdin=subprocess.DEVNULL,
        **streams,  # type: ignore[call-overload]
    )  # fmt: skip
    for descriptor in set(streams.values()):
        os.close(descriptor)  # type: ignore[arg-type]
    return process


def without_inputs(place: Path, sound: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in state(place).items() if name not in sound}


def try_fault(stage: str, name: str, sound: Path, folder: Path, inputs: dict[str, str],
              expected: dict[str, str], seconds: float) -> tuple[str, str]:  # fmt: skip
    """The class of what came of a fault, and what was printed."""
    fault, place = FAULTS[name], folder / "run"
    if place.exists():
        subprocess.run(["chmod", "-R", "u+rw", place], check=True)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    out = "here/out" if (fault.around and "disk" in name) or name == "no inodes" else "out"
    words = [out if word == "out" else word for word in STAGES[stage]]
    if fault.code == GONE:
        words = [str(place / word) if (place / word).exists() or word == "out" else word
                 for word in words]  # fmt: skip
    log = place.parent / "log"
    log.write_text("")
    with ExitStack() as stack:
        if fault.around:
            fault.around(place, stack)
        process = start(words, fault, place, log)
        try:
            if fault.kill is not None:
                time.sleep(seconds * 0.85)
                with suppress(ProcessLookupError):
                    process.send_signal(fault.kill)
            code = process.wait(600)
        except subprocess.TimeoutExpired:
            process.kill()
            return "HANG", log.read_text(errors="replace")
        text = log.read_text(errors="replace")
        there = [*(place / out).parent.glob("*out*"), *(place / out).parent.glob(".*out*")]
        left = [file.name for file in there] if code else []
        if left == ["out"]:  # whole; only the last line could not be printed
            left = []
    if code not in fault.codes:
        return f"EXIT {code}", text
    if "Traceback" in text or "Exception ignored" in text:
        return "TRACEBACK", text
    says = [line for line in text.splitlines() if line.startswith("m2d ") and "error:" in line]
    if code == 2 and "stderr" not in fault.streams and (len(says) != 1 or len(says[0]) > 700):
        return "LINES", text
    if code == 2 and left and stage not in ("teacher-logits", "distill"):
        return "left over", f"{left}\n{text}"
    (place / "here").mkdir(exist_ok=True) if out != "out" else None
    if out == "out":
        place.chmod(0o755)
        for file in place.rglob("*") if name == "unreadable inputs" else []:
            file.chmod(0o755)
    again = [out if word == "out" else word for word in STAGES[stage]]
    process = start(again, Fault(), place, log)
    second = process.wait(600)
    text += log.read_text(errors="replace")
    if second not in ((0, 2) if code == 0 else (0,)) or (second == 2 and "exists" not in text):
        return f"THEN {second}", text
    found = {k.removeprefix("here/"): v for k, v in without_inputs(place, inputs).items()}
    if found != expected:
        names = found.keys() | expected.keys()
        odd = sorted(name for name in names if found.get(name) != expected.get(name))
        return "OTHER FILES", f"{odd[:6]}\n{text}"
    return ("taken" if code == 0 else f"exit {code}"), text


def faults(wanted: list[str], folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Stage, fault, class and what was printed."""
    sound, back = folder / "sound", Path.cwd()
    sound.mkdir()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        make_sound(sound)
    finally:
        os.chdir(back)
    inputs = state(sound)
    stages = [word for word in wanted if word in STAGES] or list(STAGES)
    names = [word for word in wanted if word in FAULTS] or list(FAULTS)
    for stage in stages:
        place = folder / "run"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(sound, place)
        began = time.monotonic()
        if start(list(STAGES[stage]), Fault(), place, folder / "log").wait():
            raise RuntimeError((folder / "log").read_text())
        seconds = time.monotonic() - began
        expected = without_inputs(place, inputs)
        for name in names:
            if name in NEEDS_ROOT and os.getuid():
                continue
            kind, text = try_fault(stage, name, sound, folder, inputs, expected, seconds)
            yield stage, name, kind, text


def main() -> int:
    classes: Counter[str] = Counter()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="m2d-faults-") as folder:
        for stage, name, kind, text in faults(sys.argv[1:], Path(folder)):
            classes[kind] += 1
            print(f"{kind}: {stage}, {name}", flush=True)
            if kind != "taken" and not kind.startswith("exit"):
                bad += 1
                print("\n".join("    " + line for line in text.strip().splitlines()[-12:]))
    for kind, count in classes.most_common():
        print(f"{count:6d}  {kind}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
