"""A real Slurm on this machine, in a folder of its own: two nodes, two partitions, fake GPUs.

Not a test: `tests/test_slurm.py` runs on it. Needs munged, slurmctld, slurmd and root.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "srun", "scontrol")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
AuthInfo=socket={folder}/munge.sock
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
MinJobAge=3600
KillWait=2
ReturnToService=2
{nodes}
PartitionName=cpu Nodes={names} Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
PartitionName=gpu Nodes={names} MaxTime=60 State=UP OverSubscribe=FORCE:4
"""
# A fake GPU must be a character device.
FAKE_GPUS = ("/dev/null", "/dev/zero")


@dataclass
class Cluster:
    """Its folder, and what jobs and users need in their environment."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def finished(self) -> list[dict[str, str]]:
        """The jobs that have ended, with the fields of Slurm's completion log."""
        log = self.folder / "jobcomp.txt"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        return [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in lines]


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return [*missing, *([] if os.geteuid() == 0 else ["root"])]


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Start one, wait until its node is idle, and end its three processes afterwards."""
    # Paths of sockets have about 107 characters, and pytest's folders are long.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    processes: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as output:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            )

    environment = write_files(folder)
    try:
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "seed")]
        start("munged", "--foreground", "--force", "--socket", f"{folder}/munge.sock", *files)
        wait_for(lambda: (folder / "munge.sock").exists(), folder)
        start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for name in node_names():
            start("slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", name)
        cluster = Cluster(folder, environment)
        wait_for(lambda: states(cluster) == {"idle"}, folder)
        yield cluster
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def write_files(folder: Path) -> dict[str, str]:
    """Slurm's configuration, and the environment that leads to it."""
    names = node_names()
    for name in ("bin", "ctld", *(f"spool.{node}" for node in names)):
        (folder / name).mkdir()
    about = subprocess.run(["slurmd", "-C"], capture_output=True, text=True, check=True).stdout
    cores = " ".join(part for part in about.splitlines()[0].split() if not part.startswith("NodeN"))
    nodes = [
        f"NodeName={name} NodeHostname={names[0]} NodeAddr=127.0.0.1 Port={free_port()} {cores} "
        f"Gres=gpu:fake:{len(FAKE_GPUS)} State=UNKNOWN"
        for name in names
    ]
    conf = CONF.format(
        host=names[0], folder=folder, nodes="\n".join(nodes), names=",".join(names),
        ctld_port=free_port(),
    )  # fmt: skip
    (folder / "slurm.conf").write_text(conf, encoding="utf-8")
    gres = [f"NodeName={n} Name=gpu Type=fake File={gpu}" for n in names for gpu in FAKE_GPUS]
    (folder / "gres.conf").write_text("\n".join(gres) + "\n", encoding="utf-8")
    # The jobs' own srun loses SLURM_CONF, and looks in /etc/slurm: lead it back.
    srun = folder / "bin" / "srun"
    srun.write_text(
        f'#!/bin/sh\nexport SLURM_CONF={folder}/slurm.conf\nexec {shutil.which("srun")} "$@"\n',
        encoding="utf-8",
    )
    srun.chmod(0o755)
    return {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }


def node_names() -> tuple[str, str]:
    """Two nodes, both this machine; jobs find one another by these names."""
    return socket.gethostname().split(".")[0], "localhost"


def states(cluster: Cluster) -> set[str]:
    try:
        return set(cluster.run("sinfo", "--noheader", "--format=%T").split())
    except subprocess.CalledProcessError:
        return set()


def wait_for(condition, folder: Path, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(
                f.read_text(errors="replace")
                for f in [*folder.glob("*.log"), *folder.glob("*.out")]
            )
            raise AssertionError(f"Slurm did not start:\n{logs}")
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
