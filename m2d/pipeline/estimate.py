"""What a target of the workflow will take, before anything runs.

The jobs are those of the workflow's own dry run; what each needs follows from the config and the
teachers' sizes by the formulas of m2d/pipeline/resources.py, at a stated speed of one GPU:

    hours of a job = operations / (FLOP/s x utilization x GPUs) + bytes of models / disk speed
    GPU-hours      = hours x GPUs, summed over jobs
    disk           = what the jobs write and keep, and the largest checkpoints of one job

Jobs of teachers without sizes, and those that compute next to nothing (rankings, tables), count
with the time and memory that they ask for. lm-eval's share of the speed is far below training's:
state it by a lower --utilization.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2d.errors import UserError
from m2d.options import above_zero, share
from m2d.pipeline.jobs import hardware_of, need_of, resources_of, sizes_of
from m2d.pipeline.place import snakefile
from m2d.pipeline.resources import Need, item_bytes
from m2d.pipeline.settings import Config, load_config

# Rules on a teacher that compute next to nothing.
UNSIZED = {
    "clear_teacher_logits",
    "combine_statistics",
    "complete_teacher_logits",
    "download_teacher",
    "rank_experts",
}
JOB = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):\n((?:    .*\n)*)", re.M)


@dataclass(frozen=True)
class Job:
    """A job of a dry run."""

    rule: str
    names: dict[str, str]
    mem_mb: float
    minutes: float


@dataclass
class Row:
    """A rule's jobs together; memory is that of the largest."""

    rule: str
    jobs: int = 0
    gpus: int = 0
    gpu_hours: float = 0.0
    longest_hours: float = 0.0
    tokens: float = 0.0
    disk_gb: float = 0.0
    scratch_gb: float = 0.0
    memory_gb: float = 0.0
    gpu_memory_gb: float = 0.0


@dataclass
class Plan:
    """A target's plan: a row per rule, and what holds for all."""

    target: str
    rows: list[Row] = field(default_factory=list)
    downloads_gb: float = 0.0

    def totals(self) -> dict[str, float]:
        """Jobs, GPU-hours, tokens and disk, GB."""
        kept = sum(row.disk_gb for row in self.rows)
        return {
            "jobs": sum(row.jobs for row in self.rows),
            "gpu_hours": sum(row.gpu_hours for row in self.rows),
            "tokens": sum(row.tokens for row in self.rows),
            "disk_gb": kept + max((row.scratch_gb for row in self.rows), default=0.0),
            "downloads_gb": self.downloads_gb,
        }


def jobs_of(output: str) -> list[Job]:
    """The jobs in what `snakemake --dry-run` prints."""
    found = []
    for rule, details in JOB.findall(output):
        lines = (line.strip().partition(": ") for line in details.splitlines())
        fields = {key: value for key, _, value in lines}
        resources = pairs(fields.get("resources", ""))
        found.append(
            Job(
                rule,
                pairs(fields.get("wildcards", "")),
                float(resources.get("mem_mb", 0)),
                float(resources.get("runtime", 0)),
            )
        )
    return found


def pairs(text: str) -> dict[str, str]:
    """{"a": "1", "b": "2"} of "a=1, b=2"."""
    return dict(part.split("=", 1) for part in text.split(", ") if "=" in part)


def dry_run(target: str, everything: bool, config: Path) -> str:
    """Snakemake's dry run of a target in this folder. Raises UserError with its reason."""
    importlib.import_module("snakemake")  # says what to install where it is missing
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile())]
    command += ["--configfile", str(config), "--dry-run", "--nolock", "--cores", "1"]
    command += ["--rerun-incomplete", *(["--forceall"] if everything else []), "--", target]
    if not target.strip():
        raise UserError("the target is empty; name a pipeline of the config, or a file")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        # Its log, which ends with the reason, goes to stdout.
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(f"{target}: snakemake --dry-run failed ({lines[-1] if lines else '?'})")
    return done.stdout + done.stderr


def plan_of(target: str, jobs: Iterable[Job], config: Config) -> Plan:
    """The plan of a target's jobs, dearest rules first, without targets, which run nothing."""
    rows: dict[str, Row] = {}
    teachers: set[str] = set()
    for job in jobs:
        if job.rule in config["pipelines"] or job.rule in ("all", "tables", "all_evals"):
            continue
        row = rows.setdefault(job.rule, Row(job.rule))
        row.jobs += 1
        add_job(row, job, config)
        if "teacher" in job.names:
            teachers.add(job.names["teacher"])
    models = {config["teachers"][name]["model"]: name for name in teachers}
    downloads = sum(
        (size_on_hub(config, name) for model, name in models.items() if not Path(model).is_dir()),
        0.0,
    )
    ordered = sorted(rows.values(), key=lambda row: (-row.gpu_hours, row.rule))
    return Plan(target, ordered, downloads)


def add_job(row: Row, job: Job, config: Config) -> None:
    """Add one job to its rule's row, in place."""
    rule, names = job.rule, dict(job.names)
    for kind in ("evaluate_teacher", "evaluate_student"):
        if rule.startswith(f"{kind}_"):
            rule, names["evaluation"] = kind, rule.removeprefix(f"{kind}_")
    need, gpus = Need(), 0
    hours = job.minutes / 60
    if "teacher" in names and rule not in UNSIZED:
        asked = resources_of(config, rule, names, 1)
        gpus = int(asked["processes"] or 0) * int(asked["nodes"] or 1)
        known = need_of(config, rule, names)
        if known is not None:
            need = known
            hours = need.seconds(hardware_of(config)) / 3600
    row.gpus = max(row.gpus, gpus)
    row.gpu_hours += hours * gpus
    row.longest_hours = max(row.longest_hours, hours)
    row.tokens += need.tokens
    row.disk_gb += need.write / 1e9
    row.scratch_gb = max(row.scratch_gb, need.scratch / 1e9)
    row.memory_gb = max(row.memory_gb, job.mem_mb / 1e3)
    row.gpu_memory_gb = max(row.gpu_memory_gb, need.gpu_memory / 1e9 if gpus else 0.0)


def size_on_hub(config: Config, teacher: str) -> float:
    """GB of a teacher's weights in its config's dtype."""
    sizes = sizes_of(config, teacher)
    if not sizes:
        return 0.0
    return (
        sizes["teacher_parameters"] * item_bytes(config["teachers"][teacher]["dtype"], sizes) / 1e9
    )


def as_text(plan: Plan, config: Config) -> str:
    """The plan as a table, with what it rests on."""
    hardware, totals = hardware_of(config), plan.totals()
    head = ["", "jobs", "GPUs", "GPU-hours", "longest, h", "tokens", "disk, GB", "memory, GB",
            "GPU memory, GB"]  # fmt: skip
    body = [
        [row.rule, str(row.jobs), str(row.gpus or "-"), *map(
            number,
            (row.gpu_hours, row.longest_hours, row.tokens, row.disk_gb, row.memory_gb,
             row.gpu_memory_gb),
        )]
        for row in plan.rows
    ]  # fmt: skip
    keys = ("gpu_hours", "tokens", "disk_gb")
    hours, tokens, disk = (number(totals[key]) for key in keys)
    body.append(["total", str(round(totals["jobs"])), "", hours, "", tokens, disk, "", ""])
    scratch = max((row.scratch_gb for row in plan.rows), default=0.0)
    notes = [
        f"One GPU: {hardware.flops:.3g} FLOP/s, of which {hardware.utilization:.0%} are used; "
        f"disk {hardware.disk_gb_per_second:g} GB/s. Memory of the largest job; GPUs of one job.",
        f"Disk: with {number(scratch)} GB of checkpoints of one distillation at a time; "
        f"downloads of teachers, about {number(plan.downloads_gb)} GB, on top.",
    ]
    notes += [
        f"{row.rule}: {row.gpu_memory_gb:.0f} GB on a GPU is more than gpu_memory_gb = "
        f"{hardware.gpu_memory_gb:g}"
        for row in plan.rows
        if row.gpu_memory_gb > hardware.gpu_memory_gb
    ]
    return "\n".join([*columns([head, *body]), "", *notes])


def number(value: float) -> str:
    """For a table, three digits: 4.01B, 93.5M, 1234, 12.3, -."""
    if not value:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def columns(rows: list[list[str]]) -> list[str]:
    """Lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="a pipeline of the config, such as all_headline, or a file")
    parser.add_argument("--config", default="config.yaml", help="(config.yaml)")
    parser.add_argument("--all", action="store_true", help="also what is done already")
    parser.add_argument(
        "--flops", type=above_zero, help="of one GPU at its best (default: the config's)"
    )
    parser.add_argument("--utilization", type=share, help="what is reached of it (the config's)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    path = Path(args.config)
    config = load_config(path)
    for key in ("flops", "utilization"):
        if (value := getattr(args, key)) is not None:
            config["hardware"][key] = value
    plan = plan_of(args.target, jobs_of(dry_run(args.target, args.all, path)), config)
    print(as_json(plan, config) if args.json else as_text(plan, config))


def as_json(plan: Plan, config: Config) -> str:
    """Everything, unrounded."""
    facts: dict[str, Any] = {"target": plan.target, "rules": {}, "total": plan.totals()}
    facts["hardware"] = vars(hardware_of(config))
    for row in plan.rows:
        facts["rules"][row.rule] = {k: v for k, v in vars(row).items() if k != "rule"}
    return json.dumps(facts, indent=1)
