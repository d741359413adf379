"""Many commands without the start-up of each: `m2d forkserver snakemake ...`.

Importing torch and transformers takes several seconds of a CPU, most of a command on a small model.
Under `m2d forkserver RUN ...`, each `m2d` that RUN calls is the fork of one process that has
imported them. The fork has its caller's streams, folder, environment and number of threads, takes
its signals and gives it the exit status. A command runs as always where there is no server, and
where its environment differs in what libraries read when they are imported.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from m2d.errors import UserError

# Where the server listens, in the environment of what runs under it.
ADDRESS = "M2D_FORKSERVER"
# What commands import on the way, beyond what they import at once.
ON_THE_WAY = ("m2d.distill.trainer", "lm_eval.evaluator", "lm_eval.models.huggingface")
# Variables that may differ between the server and a command: no library reads them on import, or
# `run_for` sees to them.
MAY_DIFFER = re.compile(
    r"PWD|OLDPWD|SHLVL|_|TMP|TEMP|TMPDIR|TEMPDIR|\w+_(NUM|MAXIMUM)_THREADS|MALLOC_\w+|M2D_FORKSERVER"
)
# glibc's settings that a process can change later, and their numbers for mallopt.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REFUSED = b"refused"
# CUDA and ROCm do not survive a fork, and importing some libraries may start them.
GPUS = ("/dev/nvidiactl", "/dev/kfd")


def read_on_import(environment: dict[str, str]) -> dict[str, str]:
    """What of an environment must be equal in the server and in a command."""
    return {key: value for key, value in environment.items() if not MAY_DIFFER.fullmatch(key)}


# --- the command that asks for a fork -------------------------------------------------


def run_there(arguments: list[str]) -> int | None:
    """Run `m2d ARGUMENTS` as a fork of the server; its exit code, or None where it must run here.

    A command that a signal ended ends this process in the same way.
    """
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(os.environ[ADDRESS])
    except OSError:
        return None
    before = {
        number: signal.signal(number, lambda number, _: server.send(bytes([number])))
        for number in FORWARDED
    }
    answer = b""
    with contextlib.suppress(OSError):  # the server has ended
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps([arguments, str(Path.cwd()), dict(os.environ)]).encode() + b"\n")
        answer = server.recv(len(REFUSED))
    for number, handler in before.items():
        signal.signal(number, handler)
    if answer == REFUSED:
        return None
    if not answer:
        print("m2d: error: the fork server ended before its command did", file=sys.stderr)
        return 1
    code = int(answer)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# --- the server -----------------------------------------------------------------------


def serve(address: Path, owner: int) -> NoReturn:
    """Import everything, then fork for each caller, until the other end of pipe `owner` closes."""
    from m2d.cli import COMMANDS

    mine = read_on_import(dict(os.environ))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; callers hand on theirs
    for module in (*(module for module, _ in COMMANDS.values()), *ON_THE_WAY):
        with contextlib.suppress(ModuleNotFoundError):  # of an extra
            importlib.import_module(module)
    gc.freeze()  # else the first collection in each fork would copy all pages
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(address))
    except FileNotFoundError:  # RUN has ended already, and its folder is gone
        os._exit(0)
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(owner, selectors.EVENT_READ, "owner")
    waiting.register(listener, selectors.EVENT_READ, "listener")
    while True:
        for key, _ in waiting.select():
            if key.data == "owner":
                os._exit(0)
            elif key.data == "listener":
                caller, _ = listener.accept()
                request = request_of(caller, mine)
                if not request:
                    caller.close()
                    continue
                pid = os.fork()
                if not pid:
                    for other in [caller.fileno(), *(e.fd for e in waiting.get_map().values())]:
                        os.close(other)
                    sys.exit(run_for(*request))
                for stream in request[0]:
                    os.close(stream)
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, caller))
                waiting.register(caller, selectors.EVENT_READ, (pid, None))
            else:
                pid, caller = key.data
                if isinstance(key.fileobj, socket.socket):
                    if key.fileobj.fileno() >= 0:  # else its command has ended, a moment ago
                        hand_on_signal(waiting, key.fileobj, pid)
                else:
                    report_end(waiting, key.fd, caller, pid)


def hand_on_signal(waiting: selectors.BaseSelector, caller: socket.socket, pid: int) -> None:
    """Send the command the signal that its caller got; kill it where the caller was killed."""
    number = b""
    with contextlib.suppress(OSError):
        number = caller.recv(1)
    if number:
        os.kill(pid, number[0])
    else:
        waiting.unregister(caller)
        os.killpg(pid, signal.SIGKILL)


def report_end(
    waiting: selectors.BaseSelector, ended: int, caller: socket.socket, pid: int
) -> None:
    """Tell the caller how its command ended."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        caller.sendall(str(code).encode())
    for entry in (ended, caller):
        with contextlib.suppress(KeyError):
            waiting.unregister(entry)
    os.close(ended)
    caller.close()


def request_of(
    caller: socket.socket, mine: dict[str, str]
) -> tuple[list[int], list[str], str, dict[str, str]] | None:
    """A caller's streams, arguments, folder and environment; None where it must run by itself.

    mine: what the server's libraries have read of its environment.
    """
    caller.settimeout(5)
    try:
        _, streams, _, _ = socket.recv_fds(caller, 1, 3)
        with caller.makefile("rb") as request:
            arguments, folder, environment = json.loads(request.readline())
    except (OSError, ValueError):
        return None
    if read_on_import(environment) != mine:
        caller.sendall(REFUSED)
        for stream in streams:
            os.close(stream)
        return None
    return streams, arguments, folder, environment


def run_for(
    streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]
) -> int:
    """In the fork: become the caller's command and run it. The exit code."""
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no command outlives the server
    for name, parameter in MALLOC.items():
        if environment.get(name, "").isdigit():
            libc.mallopt(parameter, int(environment[name]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    del os.environ[ADDRESS]
    tempfile.tempdir = None
    random.seed()
    threads, torch = environment.get("OMP_NUM_THREADS", ""), sys.modules.get("torch")
    if threads.isdigit() and torch:  # which has read the server's
        torch.set_num_threads(int(threads))
    from m2d.cli import main as run

    sys.argv[1:] = arguments
    return run(arguments)


# --- the command line -----------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs=argparse.REMAINDER, metavar="RUN ...", help="such as snakemake ... all_demo"
    )


def main(args: argparse.Namespace) -> None:
    if not args.run:
        raise UserError("name what to run, such as: m2d forkserver snakemake --cores 2 all_demo")
    folder = Path(tempfile.mkdtemp(prefix="m2d-"))
    address = folder / "socket"
    owner, ours = os.pipe()
    # A server on another system, or beside a GPU, is none: all commands run as always.
    if hasattr(os, "pidfd_open") and not any(map(os.path.exists, GPUS)) and not os.fork():
        os.close(ours)
        serve(address, owner)
    os.close(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        environment = {**os.environ, ADDRESS: str(address)}
        with subprocess.Popen(args.run, env=environment, restore_signals=True) as running:
            signal.signal(signal.SIGTERM, lambda *_: running.terminate())
            code = running.wait()
    except OSError as error:
        raise UserError(f"{args.run[0]}: cannot be run ({error.strerror})") from None
    finally:
        os.close(ours)
        shutil.rmtree(folder)
    if code:
        sys.exit(code if code > 0 else 128 - code)
