"""How much memory is free."""

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
