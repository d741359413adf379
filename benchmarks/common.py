"""What the benchmarks share: a teacher of Qwen3-30B-A3B's layer shape, timing, peak memory.

Every benchmark prints one JSON line per measurement: name, ratio, target, and how it was measured.
Ratios are of times taken side by side in one run, alternating, and the medians are compared.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from m2d.models.checkpoint import write_checkpoint
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


def real_shape_teacher(folder: Path, layers: int) -> Path:
    """Write a random teacher of `layers` layers, 1.25 GB each, in the hub's layout."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {**LAYER_SHAPE, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        skeleton = make_skeleton(read_config(folder)[1], folder)
        shapes = {}
        for name, shape in stored_shapes(skeleton).items():
            if name.endswith("experts.gate_up_proj"):
                for expert in range(shape[0]):
                    for part in ("gate_proj", "up_proj"):
                        key = name.replace("gate_up_proj", f"{expert}.{part}.weight")
                        shapes[key] = (shape[1] // 2, shape[2])
            elif name.endswith("experts.down_proj"):
                for expert in range(shape[0]):
                    shapes[name.replace("down_proj", f"{expert}.down_proj.weight")] = shape[1:]
            else:
                shapes[name] = shape
        generator = torch.Generator().manual_seed(0)

        def tensor(name: str) -> torch.Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(shapes[name], dtype=torch.bfloat16)
            values = torch.empty(shapes[name], dtype=torch.bfloat16)
            return values.normal_(0, 0.02, generator=generator)

        write_checkpoint(folder, {n: (torch.bfloat16, s) for n, s in shapes.items()}, tensor)
    except BaseException:
        (folder / "config.json").unlink()
        raise
    return folder


def side_by_side(
    runs: dict[str, Callable[[], object]], repeats: int = 3, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a slow spell hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + warm_up):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn or not warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(arguments: list[str]) -> tuple[float, float]:
    """Peak resident bytes and wall seconds of `python ARGUMENTS`, in a process of its own."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{arguments} failed")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def report(name: str, ratio: float, target: str, how: str, **details: object) -> None:
    """Print one measurement."""
    line = {"name": name, "ratio": round(ratio, 3), "target": target, "how": how, **details}
    print(json.dumps(line), flush=True)
