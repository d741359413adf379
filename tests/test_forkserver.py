"""Commands as forks of one process: nobody sees a difference but in time.

Server and callers are m2d's, with one command more, which tells what it finds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2d import forkserver

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd")

PROBE = """
import json, os, pathlib, signal, sys, time

def add_arguments(parser):
    parser.add_argument("--end", type=int, default=0)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--wait", type=pathlib.Path)

def main(args):
    about = {"pid": os.getpid(), "parent": os.getppid(), "folder": os.getcwd()}
    about |= {"stdin": sys.stdin.read(), "words": sys.argv[1:], "environment": dict(os.environ)}
    print(json.dumps(about), flush=True)
    print("to stderr", file=sys.stderr)
    if args.kill:
        os.kill(os.getpid(), args.kill)
    if args.wait:
        args.wait.write_text(str(os.getpid()))
        try:
            time.sleep(60)
        finally:
            args.wait.with_suffix(".unwound").touch()
    sys.exit(args.end)
"""
M2D = """
import sys
from m2d import cli, forkserver
cli.COMMANDS = {name: cli.COMMANDS[name] for name in ("forkserver", "rank")}
cli.COMMANDS["probe"] = ("probe", "what a command finds")
forkserver.ON_THE_WAY = ()
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The words that call m2d, and the environment of what runs under a server."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "probe.py").write_text(PROBE)
    (folder / "command.py").write_text(M2D)
    told = folder / "told"
    tell = f"import json, os; json.dump(dict(os.environ), open({str(told)!r}, 'w')); input()"
    words = [sys.executable, str(folder / "command.py")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        [*words, "forkserver", sys.executable, "-c", tell], stdin=subprocess.PIPE, env=environment
    ) as running:
        deadline = time.monotonic() + 30
        while not told.exists() or not told.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        inside = json.loads(told.read_text())
        address = Path(inside[forkserver.ADDRESS])
        while not address.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield words, inside
        running.communicate(b"\n")
    assert running.returncode == 0
    assert not address.parent.exists()


def probe(
    server: tuple[list[str], dict[str, str]], *words: str, folder: Path | None = None, **more: str
) -> tuple[dict, subprocess.CompletedProcess]:  # type: ignore[type-arg]
    """What the command found, and how its caller ended."""
    done = subprocess.run(
        [*server[0], "probe", *words], input="some text", env={**server[1], **more},
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return json.loads(done.stdout), done


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_fork_has_the_callers_streams_folder_and_environment(server, tmp_path):
    found, done = probe(server, "--end", "3", folder=tmp_path, OMP_NUM_THREADS="3", TMPDIR="/tmp")
    assert done.returncode == 3
    assert done.stderr == "to stderr\n"
    assert found["stdin"] == "some text"
    assert found["folder"] == str(tmp_path)
    assert found["words"] == ["probe", "--end", "3"]
    assert found["environment"]["OMP_NUM_THREADS"] == "3"
    # torchrun and other processes that it starts run as always.
    assert forkserver.ADDRESS not in found["environment"]
    again, _ = probe(server)
    assert again["parent"] == found["parent"]  # the server
    assert again["pid"] != found["pid"]


def test_bad_input_is_one_line_and_exit_code_2(server):
    done = subprocess.run(
        [*server[0], "probe", "--end", "x"], env=server[1], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"invalid int value" in done.stderr


def test_another_environment_runs_by_itself(server):
    served, _ = probe(server)
    found, _ = probe(server, HF_HUB_OFFLINE="0")
    assert found["parent"] == os.getpid()
    assert served["parent"] != os.getpid()


def test_without_a_server_it_runs_by_itself(server, tmp_path):
    words, environment = server
    found, done = probe((words, {**environment, forkserver.ADDRESS: str(tmp_path / "none")}))
    assert done.returncode == 0
    assert found["parent"] == os.getpid()


def test_a_signal_that_ends_the_command_ends_the_caller(server):
    _, done = probe(server, "--kill", str(int(signal.SIGKILL)))
    assert done.returncode == -signal.SIGKILL


def waiting(server, started: Path) -> tuple[subprocess.Popen, int]:  # type: ignore[type-arg]
    """A caller whose command sleeps, and the command's process."""
    caller = subprocess.Popen(
        [*server[0], "probe", "--wait", str(started)],
        env=server[1], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not started.exists() or not started.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return caller, int(started.read_text())


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def test_a_terminated_caller_lets_its_command_unwind(server, tmp_path):
    caller, pid = waiting(server, tmp_path / "started")
    assert pid != caller.pid
    caller.terminate()
    assert caller.wait(30) == 143
    assert (tmp_path / "started.unwound").exists()
    assert gone(pid)


def test_a_killed_caller_takes_its_command_along(server, tmp_path):
    caller, pid = waiting(server, tmp_path / "started")
    assert parent_of(pid) != caller.pid
    caller.kill()
    caller.wait(30)
    assert gone(pid)


def test_the_commands_end_with_the_server(server, tmp_path):
    """Its own server, which is killed."""
    words, environment = server
    started = tmp_path / "started"
    ask = "while ! test -S $M2D_FORKSERVER; do sleep 0.05; done; " + " ".join(
        [*words, "probe", "--wait", str(started), "</dev/null >/dev/null"]
    )
    outside = {key: value for key, value in environment.items() if key != forkserver.ADDRESS}
    with subprocess.Popen(
        [*words, "forkserver", "sh", "-c", ask], env=outside, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 30
        while not started.exists() or not started.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pid = int(started.read_text())
        os.kill(parent_of(pid), signal.SIGKILL)
        _, told = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "the fork server ended before its command did" in told
    assert gone(pid)


@pytest.mark.parametrize("run", [["no-such-program"], []])
def test_what_cannot_be_run_is_named(server, run):
    done = subprocess.run(
        [*server[0], "forkserver", *run], env=server[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_that_is_too_late_says_nothing(tmp_path):
    """RUN may end while the server still imports: its socket has no folder then."""
    code = (
        "import os, pathlib; from m2d import forkserver; "
        "forkserver.importlib.import_module = lambda name: None; "
        f"forkserver.serve(pathlib.Path({str(tmp_path / 'gone' / 'socket')!r}), os.pipe()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
