"""Several processes: joining them, and what they decide together."""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch

from m2d.devices import pick_device


def start_processes(strategy: str, device: str | None) -> tuple[str, torch.device]:
    """Join the other processes, if there are any. Returns the strategy in use and the device."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "auto":
        strategy = "zero2" if processes > 1 else "single"
    elif strategy == "ddp" and processes == 1:
        strategy = "single"
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = pick_device(device)
    # DeepSpeed is imported by accelerate in any case, and would look for an accelerator aloud.
    os.environ.setdefault("DS_ACCELERATOR", chosen.type)
    # torch, accelerate and DeepSpeed warn one another of their coming changes at every step.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if strategy in GROUPS:
        GROUPS[strategy](backend)
    return strategy, chosen


def ddp(backend: str) -> None:
    """torch's process group."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)


def zero(backend: str) -> None:
    """DeepSpeed's process group, without its shared-memory extension on CPUs.

    That extension takes a minute to build, needs a compiler, and gives the same losses.
    """
    import deepspeed

    if os.environ.get("WORLD_SIZE", "1") == "1":  # DeepSpeed wants a group also for one process
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for key, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            os.environ.setdefault(key, value)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


# Strategies that need a group of processes -> what starts it.
GROUPS = {"ddp": ddp, "zero2": zero, "zero3": zero}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def agree(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag, true if it is true in any process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def broadcast(make: Callable[[], Any]) -> Any:
    """make() of the first process, for every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return make()
    value = [make() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(value)
    return value[0]
