"""Where a distillation keeps its work, and the folder that it leaves."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from m2d import __version__
from m2d.artifacts import atomic_path, read_json, sha256_of
from m2d.devices import dtype_name
from m2d.distill.recipe import Recipe
from m2d.models.digests import weight_digests
from m2d.models.fingerprint import fingerprint
from m2d.models.hub import licence_of, revision_of
from m2d.models.schemes import QUANTISATION_KEYS
from m2d.models.teacher import count_parameters, make_skeleton
from m2d.students.files import copy_others, write_record
from m2d.students.merge import write_into
from m2d.students.record import StudentRecord, read_record
from m2d.tokens.files import open_tokens


def identity(recipe: Recipe, student: Path, teacher: Path, tokens: Path) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from; JSON values only.

    Student and tokens by content; the teacher, which may be tens of gigabytes, by its fingerprint.
    """
    return {
        "recipe": recipe.model_dump(),
        "tokens_sha256": sha256_of(tokens),
        "student_sha256": {
            "config.json": sha256_of(student / "config.json"),
            **weight_digests(student),
        },
        "teacher_config_sha256": sha256_of(teacher / "config.json"),
        "teacher_fingerprint": fingerprint(teacher),
        "m2d_version": __version__,
    }


def work_folder(out: Path, run: dict[str, Any]) -> Path:
    """The hidden folder beside `out` for the checkpoints of exactly this run.

    Its name carries the run's digest, so that a run with other arguments begins anew, and going
    back to the first arguments goes on with the first run.
    """
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    return out.parent / f".{out.name}.checkpoints-{digest[:12]}"


def other_work(out: Path, work: Path) -> list[Path]:
    """Work folders that runs with other arguments left beside `out`."""
    name = re.compile(re.escape(f".{out.name}.checkpoints-") + "[0-9a-f]{12}")
    found = out.parent.iterdir() if out.parent.is_dir() else []
    return [f for f in found if name.fullmatch(f.name) and f != work and not f.is_symlink()]


def record_of(
    student: Path,
    teacher_name: str,
    teacher: Path,
    teacher_config: Any,
    recipe: Recipe,
    run: dict,
    tokens: Path,
) -> StudentRecord:
    """m2d.json of the distilled folder: the student's own record and how it was distilled."""
    record = read_record(student / "m2d.json", absent=True)
    if "teacher" not in record.model_fields_set:
        about = {"name": teacher_name, "model_type": teacher_config.model_type}
        revision = revision_of(teacher)
        about |= {"revision": revision} if revision else {}
        record = record.having(teacher={**about, **licence_of(teacher)})
    found = open_tokens(tokens)
    distillation = {
        "source": found.notes.get("source"),
        "tokens": recipe.steps * recipe.batch * found.length,
        "length": found.length,
        "teacher": teacher_name,
        **recipe.model_dump(),
        **{k: v for k, v in run.items() if k not in ("recipe", "m2d_version")},
    }
    return record.having(distillation=distillation)


def unpacked_config(student: Path, dtype: torch.dtype) -> dict[str, Any]:
    """A student's config.json for weights in `dtype`, which are not quantised any more."""
    raw = read_json(student / "config.json")
    kept = {key: value for key, value in raw.items() if key not in QUANTISATION_KEYS}
    named = dtype_name(dtype)
    own = raw.get("dtype", raw.get("torch_dtype"))
    return kept if own == named else {**kept, "dtype": named, "torch_dtype": named}


def save_result(
    out: Path,
    student: Path,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    metrics: Path,
    record: StudentRecord,
) -> None:
    """Write the distilled student as a stock model folder, whole or not at all.

    `weights` are cast to `dtype`, that of the student's folder, whatever they were trained in.
    """
    fresh = make_skeleton(config, student)
    cast = {name: weight.detach().to("cpu", dtype) for name, weight in weights.items()}
    fresh.load_state_dict(cast, assign=True)
    fresh.tie_weights()
    model = {"architecture": type(fresh).__name__, "parameters": count_parameters(fresh)}
    known = {} if "student" in record.model_fields_set else {"student": model}
    record = record.having(**known, dtype=dtype_name(dtype))
    with atomic_path(out) as folder:
        fresh.save_pretrained(folder)
        # The config stays as it was: in transformers' own spelling other programs misread it.
        (folder / "generation_config.json").unlink(missing_ok=True)
        write_into(folder, "config.json", unpacked_config(student, dtype))
        copy_others(student, folder, processors=True)
        shutil.copyfile(metrics, folder / "metrics.jsonl")
        write_record(folder, record)
