"""Where a distillation keeps its work, and the folder that it leaves."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from m2d import __version__
from m2d.artifacts import atomic_path, read_json, sha256_of
from m2d.distill.trainer import Recipe
from m2d.models.hub import licence_of, revision_of
from m2d.models.teacher import count_parameters, make_skeleton
from m2d.students.card import model_card
from m2d.students.files import copy_others


def identity(recipe: Recipe, student: Path, teacher: Path, tokens: Path) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from; JSON values only.

    Student and tokens by content. The teacher, which may be tens of gigabytes, by its config's
    content and its weights' names, sizes and times.
    """
    stats = {file.name: file.stat() for file in weight_files(teacher)}
    return {
        "recipe": recipe.model_dump(),
        "tokens_sha256": sha256_of(tokens),
        "student_sha256": {
            file.name: sha256_of(file) for file in [student / "config.json", *weight_files(student)]
        },
        "teacher_config_sha256": sha256_of(teacher / "config.json"),
        "teacher_files": {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()},
        "m2d_version": __version__,
    }


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix == ".safetensors")


def work_folder(out: Path, run: dict[str, Any]) -> Path:
    """The hidden folder beside `out` for the checkpoints of exactly this run.

    Its name carries the run's digest, so that a run with other arguments begins anew, and going
    back to the first arguments goes on with the first run.
    """
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    return out.parent / f".{out.name}.checkpoints-{digest[:12]}"


def other_work(out: Path, work: Path) -> list[Path]:
    """Work folders that runs with other arguments left beside `out`."""
    found = out.parent.glob(f".{out.name}.checkpoints-*") if out.parent.is_dir() else []
    return [folder for folder in found if folder != work]


def record_of(
    student: Path,
    teacher_name: str,
    teacher: Path,
    teacher_config: Any,
    recipe: Recipe,
    run: dict,
    tokens: Path,
) -> dict[str, Any]:
    """m2d.json of the distilled folder: the student's own record and how it was distilled."""
    own = student / "m2d.json"
    record: dict[str, Any] = read_json(own) if own.is_file() else {}
    if "teacher" not in record:
        about = {"name": teacher_name, "model_type": teacher_config.model_type}
        revision = revision_of(teacher)
        about |= {"revision": revision} if revision else {}
        record["teacher"] = {**about, **licence_of(teacher)}
    with safe_open(tokens, "np") as file:
        metadata = file.metadata() or {}
        length = file.get_slice("input_ids").get_shape()[1]
    distillation = {
        "source": metadata.get("source"),
        "tokens": recipe.steps * recipe.batch * length,
        "length": length,
        "teacher": teacher_name,
        **recipe.model_dump(),
        **{k: v for k, v in run.items() if k.endswith("_sha256") or k == "teacher_logits"},
    }
    return {**record, "m2d_version": __version__, "distillation": distillation}


def save_result(
    out: Path,
    student: Path,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    metrics: Path,
    record: dict[str, Any],
) -> None:
    """Write the distilled student as a stock model folder, whole or not at all.

    `weights` are cast to `dtype`, that of the student's folder, whatever they were trained in.
    """
    fresh = make_skeleton(config, student)
    cast = {name: weight.detach().to("cpu", dtype) for name, weight in weights.items()}
    fresh.load_state_dict(cast, assign=True)
    fresh.tie_weights()
    record.setdefault(
        "student", {"architecture": type(fresh).__name__, "parameters": count_parameters(fresh)}
    )
    record["dtype"] = str(dtype).removeprefix("torch.")
    with atomic_path(out) as folder:
        fresh.save_pretrained(folder)
        copy_others(student, folder)
        shutil.copyfile(metrics, folder / "metrics.jsonl")
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / "m2d.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")
