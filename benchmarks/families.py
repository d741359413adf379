"""Every Mixture-of-Experts text generator of the installed transformers: is its student exact?

A tiny random teacher of each model type, its router uniform and its top-k all of its experts, goes
through files on disk to a student, whose logits are compared with the teacher's. Writes the table
of docs/families.md. Each type runs in a process of its own, with limits of time and memory, so that
one that hangs costs no other its row.

usage: python benchmarks/families.py [--out docs/families.md] [--minutes 3] [MODEL_TYPE ...]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tiny_families import EXPERTS, model_types, tiny_config, write_teacher

import m2d
from m2d.errors import UserError
from m2d.models.skeleton import auto_class
from m2d.models.teacher import open_teacher, read_config

EXACT = 1e-4
MEMORY = 6 * 2**30  # bytes of data that one type may take
# Routers whose weights differ between experts even where all logits are equal.
SCALINGS = {"phimoe": "least_squares"}


def load(folder: Path) -> Any:
    """The model of a folder, by the stock class that its config names, in float32."""
    _, config = read_config(folder)
    return auto_class(config).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def error_of(teacher: Any, student: Path, ids: torch.Tensor) -> float:
    """Relative distance of the student's logits from the teacher's."""
    expected = teacher(input_ids=ids).logits
    return float((load(student)(input_ids=ids).logits - expected).norm() / expected.norm())


def row_of(model_type: str, work: Path) -> dict[str, str]:
    """One line of the table."""
    row = {"teacher": model_type, "student": "", "how": "", "error": ""}
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, work / "tokens.safetensors")
    options: dict[str, Any] = {
        "scoring": "selection_freq",
        "scaling": SCALINGS.get(model_type, "uniform"),
        "tokens": work / "tokens.safetensors",
        "dtype": "float32",
    }
    try:
        model = write_teacher(tiny_config(model_type), work / "teacher")
        with torch.no_grad():
            model(input_ids=ids)
    except Exception as error:
        return row | {"how": f"not tried: no tiny model ({short(error)})"}
    try:
        family = open_teacher(work / "teacher").family
        m2d.convert(work / "teacher", work / "student", **options)
        error = error_of(model, work / "student", ids)
        row["student"], row["error"] = family.student_architecture, f"{error:.0e}"
        count = family.student_experts
        row["how"] = f"{count} expert{'s' * (count > 1)}, always taken" if count else "dense"
        if family.left_out:
            row["how"] += f"; {family.left_out}"
        if family.approximated:
            m2d.convert(work / "teacher", work / "same", student_class="same", **options)
            same = error_of(model, work / "same", ids)
            row["how"] += f"; {family.approximated} (`--student-class same`: {same:.0e})"
        elif error > EXACT:
            row["how"] = f"WRONG: {row['how']}"
    except UserError as error:
        row["how"] = f"refused: {short(error).replace(str(work / 'teacher'), '')}"
    except Exception as error:
        row["how"] = f"fails: {short(error)}"
    return row


def short(error: Exception) -> str:
    """The first line of an error, without folders."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace("|", "/")[:300].replace("/config.json: ", "")


def table(rows: list[dict[str, str]]) -> str:
    """The page."""
    done = [row for row in rows if row["error"]]
    lines = [
        "# Which families convert, and how exactly",
        "",
        "Written by `python benchmarks/families.py --out docs/families.md`; do not edit. Every "
        f"Mixture-of-Experts text generator of transformers {transformers.__version__}, "
        f"{len(rows)} model types, as a tiny random model with {EXPERTS} experts, all of which the "
        "router takes and weighs alike, through files on disk in float32. The error is the "
        "relative distance of the student's logits from the teacher's: a few 1e-7 is rounding. "
        "Random weights make what is approximated look worse than it is in a trained model. "
        "Where a token takes one expert in any config (Zaya), the experts are all the same.",
        "",
        "**Gemma 4** adds two branches in every layer, a dense FFN and the experts' sum, each with "
        "norms of its own before and after it. The student keeps both: the dense branch and all "
        "norms as they are, and one expert, always taken, in place of the others. That is exact as "
        "for any family. But the norm after the experts' sum takes out a factor that all groups "
        "share, so a scaling matters only by the groups' proportions; and no closed form fits a "
        "down projection through a norm, so such a student has no refit and no alignment before "
        "distillation. One dense FFN in place of both branches could hold neither's norms.",
        "",
        f"{len(done)} of {len(rows)} convert.",
        "",
        "| teacher | student | its FFNs | error |",
        "|---|---|---|---|",
    ]
    for row in rows:
        student = f"`{row['student']}`" if row["student"] else ""
        lines.append(f"| `{row['teacher']}` | {student} | {row['how']} | {row['error']} |")
    return "\n".join(lines) + "\n"


def run_alone(model_type: str, minutes: float) -> dict[str, str]:
    """`row_of` in a process of its own."""
    row = {"teacher": model_type, "student": "", "how": "", "error": ""}
    command = [sys.executable, __file__, "--row", model_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return row | {"how": f"fails: not done after {minutes:g} minutes"}
    try:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return row | {"how": f"fails: the process ended with {done.returncode}"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0, help="that one type may take")
    parser.add_argument("--row", action="store_true", help="one type, here, as a line of JSON")
    args = parser.parse_args()
    types = args.types or model_types()
    if args.row:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        warnings.filterwarnings("ignore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory(prefix="families-") as work:
            print(json.dumps(row_of(types[0], Path(work))))
        return
    rows = []
    for number, model_type in enumerate(types, 1):
        start = time.monotonic()
        rows.append(run_alone(model_type, args.minutes))
        took = f"{time.monotonic() - start:.0f} s"
        print(f"[{number}/{len(types)}, {took}]", *rows[-1].values(), sep="  ", flush=True)
    if args.out:
        args.out.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
