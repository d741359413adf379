"""What this machine computes on: its device, the dtype that the device multiplies fast, its memory.

A checkpoint's dtype is that of its weights. Most CPUs have no units for bfloat16 or float16 and
multiply them a hundred times as slowly as float32; there `auto` computes in float32, and weights
are widened product by product (m2d.models.widen).
"""

import contextlib
import ctypes
import functools
import os
import time
from pathlib import Path
from typing import Any

import torch

from m2d.errors import UserError
from m2d.options import AUTO
from m2d.progress import say

# Memory that all experts' outputs on a chunk of tokens may take on a CPU.
CHUNK_BYTES = 220_000_000
MEASURED_SIZE = 128  # rows and columns of the products that are timed: under 5 ms on a slow CPU
# What keeps oneDNN or PyTorch from the units that a CPU has; then only a measurement tells.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# Of torch.cpu.get_capabilities(): what multiplies a dtype in hardware.
UNITS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),  # the last one on ARM
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
# The first CUDA capability with units for a dtype.
CAPABILITIES = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}


def pick_device(device: str | None) -> torch.device:
    """The named device, or the default one: a GPU if there is one."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: not available here ({reason})") from None
    return chosen


def pick_dtype(dtype: str | None, default: torch.dtype) -> torch.dtype:
    """A torch dtype by name."""
    return getattr(torch, dtype) if dtype else default


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, without the module's name."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(asked: str | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in, by its name or by `auto`: `stored` where it is fast, else float32.

    stored: the checkpoint's dtype.
    """
    if asked and asked != AUTO:
        return pick_dtype(asked, stored)
    return stored if multiplies_fast(stored, device) else torch.float32


def announce(model: str, stored: torch.dtype, dtype: torch.dtype, device: object) -> None:
    """Say what a model is computed in, and where: a run's first line."""
    say(f"{model}: {dtype_name(stored)} weights, computed in {dtype_name(dtype)} on {device}")


def computed_on(device: torch.device | None = None) -> dict[str, Any]:
    """What may change the last digits of a result, besides its dtype."""
    chosen = device or pick_device(None)
    if chosen.type == "cuda":
        return {"device": torch.cuda.get_device_name(chosen), "torch": str(torch.__version__)}
    return {
        "device": chosen.type,
        "threads": torch.get_num_threads(),
        "units": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def multiplies_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in `dtype` are at least as fast as in float32 on this device."""
    if dtype.itemsize >= torch.float32.itemsize:
        return True
    said = hardware_says(dtype, device)
    return measured_fast(dtype, str(device)) if said is None else said


def hardware_says(dtype: torch.dtype, device: torch.device) -> bool | None:
    """What the hardware says of its units for `dtype`; None where only a measurement tells."""
    if device.type == "cuda":
        if torch.version.hip:
            return None
        return torch.cuda.get_device_capability(device) >= CAPABILITIES[dtype]
    if device.type == "cpu" and not any(name in os.environ for name in LIMITS):
        capabilities = cpu_capabilities()
        if any(capabilities.get(unit) for unit in UNITS.get(dtype, ())):
            return True
    return None


@functools.cache
def cpu_capabilities() -> dict[str, Any]:
    """What PyTorch knows of this CPU."""
    return dict(torch.cpu.get_capabilities())


@functools.cache
def measured_fast(dtype: torch.dtype, device: str) -> bool:
    """Whether a small product in `dtype` takes at most as long as one in float32."""
    narrow, wide = (product_seconds(kind, device) for kind in (dtype, torch.float32))
    return narrow <= wide


def product_seconds(
    dtype: torch.dtype, device: str | torch.device, size: int = MEASURED_SIZE, repeats: int = 5
) -> float:
    """Seconds of the fastest of some products of square matrices [size, size]."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):  # the first one sets up
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


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
