"""Which GPU a process takes where jobs share a node without a queue that hands GPUs out.

With M2D_SHARED_GPUS=N in the environment, every process of a command that computes takes one of N
GPUs that no other has, and sees that one alone: CUDA's own choice would be the first for all.
"""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from m2d.errors import UserError

SHARED = "M2D_SHARED_GPUS"
COMMANDS = {
    "distill", "evaluate", "gram", "grid", "neurons", "perplexity", "prune", "refit", "stats",
    "teacher-logits",
}  # fmt: skip
# Open files keep their locks until the process ends.
HELD: list[IO[str]] = []


def take_gpu(command: str) -> None:
    """Leave this process one free GPU to see, before torch looks for GPUs.

    Raises UserError where all are taken.
    """
    gpus = os.environ.get(SHARED, "")
    if not gpus or command not in COMMANDS:
        return
    if not gpus.isdigit():
        raise UserError(f"{SHARED}={gpus}: must be the number of this node's GPUs")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(free_gpu(int(gpus), Path(tempfile.gettempdir())))
    if "LOCAL_RANK" in os.environ:  # of torchrun; it chooses among the GPUs that are seen
        os.environ["LOCAL_RANK"] = "0"


def free_gpu(gpus: int, folder: Path) -> int:
    """The first GPU whose lock in `folder` no other process has; held until this one ends."""
    for index in range(gpus):
        file = (folder / f"m2d-{os.getuid()}-gpu-{index}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        HELD.append(file)
        return index
    raise UserError(f"{SHARED}={gpus}: all GPUs are taken by other jobs; run fewer at a time")
