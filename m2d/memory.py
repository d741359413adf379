"""How much memory is free, and giving back what is not needed."""

import contextlib
import ctypes
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU, or else this machine, has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def release_freed_memory() -> None:
    """Hand the memory that the C library keeps for later back to the kernel (glibc's; else none).

    Tensors below its threshold lie among others in its heaps, which otherwise grow with each layer.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
