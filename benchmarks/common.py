"""What the benchmarks share: a teacher of Qwen3-30B-A3B's layer shape, timing, peak memory.

Every benchmark prints one JSON line per measurement: name, ratio, target, and how it was measured.
Ratios are of times taken side by side in one run, alternating, and the medians are compared.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from m2d.artifacts import atomic_path
from m2d.devices import LIMITS, compute_dtype, cpu_capabilities, dtype_name
from m2d.models.checkpoint import INDEX_NAME, Spec, write_safetensors
from m2d.models.student import stored_shapes
from m2d.models.teacher import make_skeleton, read_config

LAYER_SHAPE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    # Small, so that the layers and not the embeddings are measured.
    "vocab_size": 8192,
}


def compute_on(device: torch.device) -> torch.dtype:
    """What m2d computes a bfloat16 checkpoint in on a device."""
    return compute_dtype(None, torch.bfloat16, device)


CPU = torch.device("cpu")
COMPUTE = compute_on(CPU)
"""What m2d computes a bfloat16 checkpoint in on this machine."""


def kind_of_cpu() -> str:
    """What decides of a CPU: AMX, AVX512-BF16, NEON-BF16, or no bfloat16 units; and the dtype."""
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "NEON-BF16"}
    found = [name for unit, name in names.items() if cpu_capabilities().get(unit)]
    limits = ", ".join(f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    if torch.bfloat16 != COMPUTE:
        kind = f"no bfloat16 units in use ({limits})" if limits else "no bfloat16 units"
    else:
        kind = found[0] if found else "bfloat16 as fast as float32, by measurement"
    return f"{kind}; computes in {dtype_name(COMPUTE)}"


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu, or a GPU: cuda")


LAYER_BYTES = 2 * (128 * 3 * 768 * 2048 + 2 * 2048 * 4096 + 2 * 2048 * 512 + 128 * 2048)
FREE_BYTES = 10e9  # for four layers, students and copies


def scratch_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for teachers of 1.2 GB a layer, kept there and used again "
        "(default: a temporary folder, removed at the end)",
    )


@contextlib.contextmanager
def scratch_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was given, or a temporary one; exits where the disk has too little room."""
    with contextlib.ExitStack() as stack:
        folder = given or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="m2d-")))
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < FREE_BYTES:
            raise SystemExit(f"{folder}: needs {FREE_BYTES / 1e9:.0f} GB free; name another folder")
        yield folder


def real_shape_teacher(scratch: Path, layers: int) -> Path:
    """A random teacher of `layers` layers in the hub's layout, one shard a layer.

    Teachers of fewer layers share the shards of those with more, by hard links.
    """
    folder = scratch / f"qwen3-30b-a3b-{layers}-layers"
    if (folder / INDEX_NAME).exists():
        return folder
    folder.mkdir(exist_ok=True)
    config = {**LAYER_SHAPE, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    skeleton = make_skeleton(read_config(folder)[1], folder)
    parts: dict[str, dict[str, Spec]] = {}
    for name, shape in on_hub(stored_shapes(skeleton)).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        part = f"layer-{layer[1]}" if layer else "rest"
        parts.setdefault(f"model-{part}.safetensors", {})[name] = (torch.bfloat16, shape)
    for file, specs in parts.items():
        shared = scratch / file
        if not shared.exists():
            generator = torch.Generator().manual_seed(sum(file.encode()))
            with atomic_path(shared) as temporary:
                tensors = (random_tensor(n, s, generator) for n, (_, s) in specs.items())
                write_safetensors(temporary, specs, tensors, {"format": "pt"})
        (folder / file).unlink(missing_ok=True)
        (folder / file).hardlink_to(shared)
    weight_map = {name: file for file, specs in parts.items() for name in specs}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def on_hub(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the hub's files: every expert's projections apart."""
    found = {}
    for name, shape in shapes.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, part in itertools.product(range(shape[0]), ("gate_proj", "up_proj")):
                key = name.replace("gate_up_proj", f"{expert}.{part}.weight")
                found[key] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                found[name.replace("down_proj", f"{expert}.down_proj.weight")] = shape[1:]
        else:
            found[name] = shape
    return found


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def cpu_time_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time on one thread in place of wall time, for a machine that others use too",
    )


def clock_of(cpu_time: bool, device: torch.device = CPU) -> tuple[Callable[[], float], str]:
    """The clock, and what to say of it; for CPU time, torch is held to one thread."""
    if device.type == "cuda":

        def finished() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return finished, "wall time with the GPU's work done"
    if not cpu_time:
        return time.perf_counter, f"wall time, {torch.get_num_threads()} threads"
    torch.set_num_threads(1)
    return lambda: sum(os.times()[:4]), "CPU time on one thread, the machine in use by others"


def side_by_side(
    runs: dict[str, Callable[[], object]],
    repeats: int = 3,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a slow spell hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + warm_up):
        for name, run in runs.items():
            start = clock()
            run()
            if turn or not warm_up:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(arguments: list[str]) -> tuple[float, float]:
    """Peak resident bytes and CPU seconds of `python ARGUMENTS`, in a process of its own."""
    child = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} failed")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def report(name: str, ratio: float, target: str, how: str, **details: object) -> None:
    """Print one measurement."""
    line = {"name": name, "ratio": float(f"{ratio:.3g}"), "target": target, "how": how}
    line["cpu"] = kind_of_cpu()
    if torch.cuda.is_available():
        line["gpu"] = torch.cuda.get_device_name()
    line |= details
    print(json.dumps(line), flush=True)
