"""What m2d will use on this machine, and what a target of the workflow would lack."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m2d import __version__
from m2d.devices import compute_dtype, dtype_name, free_memory, product_seconds
from m2d.errors import UserError
from m2d.pipeline.estimate import Plan, dry_run, jobs_of, plan_of
from m2d.pipeline.settings import load_config

SIZE = 512  # rows and columns of the products that are timed
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What is of use, but need not be there: package -> what for.
OPTIONAL = {
    "deepspeed": "distillation on several GPUs",
    "liger-kernel": "recipes with loss_implementation: liger",
    "vllm": "evaluations with backend: vllm",
    "xllamacpp": "m2d export, which checks its file in llama.cpp",
}


@dataclass(frozen=True)
class Lack:
    """Something that a target needs more of than there is."""

    what: str
    needed: str
    here: str


def speeds(device: torch.device) -> dict[str, float]:
    """GFLOP/s of a product of square matrices, by dtype."""
    return {
        dtype_name(dtype): 2 * SIZE**3 / product_seconds(dtype, device, SIZE, 3) / 1e9
        for dtype in DTYPES
    }


def about_device(device: torch.device) -> dict[str, Any]:
    """A device's name, memory (GB), speeds, and what it computes bfloat16 checkpoints in."""
    chosen = compute_dtype(None, torch.bfloat16, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        free, total = (n / 1e9 for n in torch.cuda.mem_get_info(device))
    else:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        name += f", {torch.backends.cpu.get_cpu_capability()}"
        free = free_memory(device) / 1e9
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "device": str(device),
        "name": name,
        "memory_gb": total,
        "free_gb": free,
        "gflops": speeds(device),
        "bfloat16_checkpoints_in": dtype_name(chosen),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slurm() -> str | None:
    """What sbatch says of its version; None where there is none."""
    if shutil.which("sbatch") is None:
        return None
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "sbatch does not answer"


def hub() -> dict[str, Any]:
    """The hub's cache, its models and room there, and whether the hub may be asked."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    models = sorted(f.name[len("models--") :].replace("--", "/") for f in cache.glob("models--*"))
    return {
        "cache": str(cache),
        "free_gb": shutil.disk_usage(there).free / 1e9,
        "models": models,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": bool(os.environ.get("HF_TOKEN")) or Path(constants.HF_TOKEN_PATH).is_file(),
    }


def facts() -> dict[str, Any]:
    """All that does not depend on a target."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "m2d": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": [about_device(device) for device in [*devices, torch.device("cpu")]],
        "disk_free_gb": shutil.disk_usage(Path.cwd()).free / 1e9,
        "hub": hub(),
        "slurm": slurm(),
        "optional": {package: version_of(package) for package in OPTIONAL},
    }


def lacks(plan: Plan, config: Mapping[str, Any], found: Mapping[str, Any]) -> list[Lack]:
    """What a target needs and has not. With Slurm, GPUs and memory are the queue's business."""
    missing: list[Lack] = []

    def compare(what: str, needed: float, here: float, unit: str) -> None:
        if needed > here:
            missing.append(Lack(what, f"{needed:,.0f} {unit}", f"{here:,.0f} {unit}"))

    gpus = [device for device in found["devices"] if device["device"] != "cpu"]
    (cpu,) = (device for device in found["devices"] if device["device"] == "cpu")
    if found["slurm"] is None:
        compare("GPUs", max((row.gpus for row in plan.rows), default=0), len(gpus), "in one job")
        memory = max((row.gpu_memory_gb for row in plan.rows if row.gpus), default=0)
        if gpus:
            compare("GPU memory", memory, min(gpu["memory_gb"] for gpu in gpus), "GB")
        most = max((row.memory_gb for row in plan.rows), default=0)
        compare("memory", most, cpu["memory_gb"], "GB")
    compare("disk", plan.totals()["disk_gb"], found["disk_free_gb"], "GB")
    compare("disk of the hub's cache", plan.downloads_gb, found["hub"]["free_gb"], "GB")
    if plan.downloads_gb and found["hub"]["offline"]:
        missing.append(Lack("the hub", f"{plan.downloads_gb:,.0f} GB of teachers", "offline"))
    missing += [
        Lack(package, OPTIONAL[package], "not installed")
        for package in packages_of(plan, config)
        if found["optional"][package] is None
    ]
    return missing


def packages_of(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """The optional packages that a target's recipes and evaluations ask for."""
    pipeline = config["pipelines"].get(plan.target, {})
    names = {entry["recipe"] for entry in pipeline.get("distill", [])}
    recipes = [config["recipes"][name] for name in names]
    evaluations = [config["evaluations"][name] for name in pipeline.get("evaluations", [])]
    asked = {
        "liger-kernel": any(r.get("loss_implementation") == "liger" for r in recipes),
        "vllm": any(e.get("backend") == "vllm" for e in evaluations),
        "deepspeed": any(row.rule == "distill_student" and row.gpus > 1 for row in plan.rows),
    }
    return [package for package, wanted in asked.items() if wanted]


def as_text(found: Mapping[str, Any]) -> str:
    """The facts, a line each."""
    lines = [f"m2d {found['m2d']}, Python {found['python']}, torch {found['torch']}"]
    for device in found["devices"]:
        speed = ", ".join(f"{name} {value:,.0f}" for name, value in device["gflops"].items())
        lines += [
            f"{device['device']}: {device['name']}, {device['free_gb']:.1f} of "
            f"{device['memory_gb']:.1f} GB free",
            f"  GFLOP/s: {speed}; bfloat16 checkpoints are computed in "
            f"{device['bfloat16_checkpoints_in']}",
        ]
    hub_facts = found["hub"]
    lines += [
        f"disk here: {found['disk_free_gb']:.0f} GB free",
        f"hub: cache {hub_facts['cache']}, {len(hub_facts['models'])} models, "
        f"{hub_facts['free_gb']:.0f} GB free{', offline' if hub_facts['offline'] else ''}, "
        f"{'a' if hub_facts['token'] else 'no'} token",
        f"Slurm: {found['slurm'] or 'none'}",
    ]
    lines += [
        f"{package}: {version or 'not installed'} ({OPTIONAL[package]})"
        for package, version in found["optional"].items()
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="a pipeline of the config: what would it lack?")
    parser.add_argument("--config", type=Path, help="of the target (config.yaml)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    if args.target is None and args.config is not None:
        raise UserError("--config: is of a target; name one, such as all_demo")
    found = facts()
    if args.target is None:
        print(json.dumps(found, indent=1) if args.json else as_text(found))
        return
    file = args.config or Path("config.yaml")
    config = load_config(file)
    plan = plan_of(args.target, jobs_of(dry_run(args.target, False, file)), config)
    missing = lacks(plan, config, found)
    if args.json:
        lacking = [asdict(lack) for lack in missing]
        print(json.dumps({**found, "target": args.target, "lacks": lacking}, indent=1))
    else:
        print(as_text(found))
        print(f"\n{args.target}:" + ("" if missing else " nothing is missing"))
        for lack in missing:
            print(f"  {lack.what}: needs {lack.needed}; here {lack.here}")
    if missing:
        raise SystemExit(1)
