"""The grid: perplexity of every configuration of one scoring method, no student written.

One student of stock class stays in memory; only its FFNs change from plan to plan, built from the
teacher's experts by the very functions that `merge` uses. Plans that give the same student are
measured once.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from m2d.artifacts import atomic_path, read_json
from m2d.choose.grouping import GROUPINGS
from m2d.choose.plan import Plan, check_keep, distinct_plans, make_plan, paper_keeps
from m2d.choose.ranking import rankings_from_dict
from m2d.choose.scaling import SCALINGS
from m2d.devices import announce, computed_on, dtype_name, free_memory
from m2d.errors import UserError
from m2d.evaluate.perplexity import digest_of_tokens, loaded_nll, make_result
from m2d.methods import Table
from m2d.models.checkpoint import Checkpoint
from m2d.models.skeleton import move_text, text_paths
from m2d.models.student import build_student_skeleton
from m2d.models.teacher import Teacher, open_teacher
from m2d.models.widen import held, widen
from m2d.models.widths import add_groups_option
from m2d.options import add_compute_options, add_student_options
from m2d.progress import progress, say
from m2d.sealed import digest_of_rows
from m2d.statistics.files import read_layers
from m2d.students.merge import require_statistics
from m2d.students.tensors import StudentTensors
from m2d.tokens.calibration import calibration

# Experts are kept in memory up to this share of what is free when the grid starts.
SHARE_OF_FREE_MEMORY = 0.6


class ExpertStore:
    """Reads tensors of a checkpoint and keeps them, as far as `limit_bytes` goes."""

    def __init__(self, checkpoint: Checkpoint, limit_bytes: float):
        self.checkpoint, self.left = checkpoint, limit_bytes
        self.kept: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        tensor = self.checkpoint.read(name)
        if tensor.nbytes <= self.left:
            self.left -= tensor.nbytes
            self.kept[name] = tensor
        return tensor


class GridStudent:
    """A student in memory whose FFNs are replaced plan by plan; all plans have one width.

    Its weights are those that a written student would have, in the teacher's dtype; its products
    are in `dtype`.
    """

    def __init__(
        self, teacher: Teacher, first: Plan, width: int, dtype: torch.dtype, device: torch.device
    ):
        announce(f"students of {teacher.name}", teacher.dtype, dtype, device)
        _, skeleton = build_student_skeleton(teacher, width)
        checkpoint = Checkpoint(teacher.folder)
        store = ExpertStore(checkpoint, SHARE_OF_FREE_MEMORY * free_memory(torch.device("cpu")))
        self.tensors = StudentTensors(
            teacher.family,
            checkpoint,
            skeleton,
            held(teacher.dtype, dtype),
            store.read,
        )
        specs = self.tensors.specs(first)
        state = {name: self.tensors.make(name, first) for name in specs}
        skeleton.load_state_dict(state, strict=False, assign=True)
        skeleton.tie_weights()
        for path in text_paths(skeleton):
            widen(skeleton.get_submodule(path), dtype)
        self.model = move_text(skeleton, device).eval()
        self.parameters = dict(self.model.named_parameters())

    @torch.no_grad()
    def become(self, plan: Plan) -> nn.Module:
        """The model, with the FFNs of `plan`."""
        for layer in plan.layers:
            for name in self.tensors.feed_forward_names(layer.layer):
                self.parameters[name].copy_(self.tensors.make(name, plan))
        return self.model


def resolved(methods: Table[Any], text: str) -> list[str]:
    """The methods of a comma-separated list."""
    return [methods.resolve(part) for part in text.split(",")]


def keeps_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--keeps {text}: whole numbers with commas are expected") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the file to write, .parquet")
    add_student_options(parser)
    parser.add_argument("--statistics", required=True, help="file from m2d stats")
    parser.add_argument("--gram", required=True, help="file from m2d gram")
    parser.add_argument("--ranking", required=True, help="file from m2d rank")
    parser.add_argument("--tokens", required=True, help="token file to measure perplexity on")
    parser.add_argument("--keeps", help="values of K, with commas (default: the paper's)")
    parser.add_argument("--groupings", default=",".join(GROUPINGS.paper))
    parser.add_argument("--scalings", default=",".join(SCALINGS.paper))
    add_groups_option(parser)
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    teacher = open_teacher(args.teacher, student_class=args.student_class, text_only=args.text_only)
    usual = paper_keeps(args.groups or teacher.top_k, teacher.num_experts)
    keeps = keeps_list(args.keeps) if args.keeps else usual
    for keep in keeps:
        check_keep(keep, teacher.top_k, teacher.num_experts, args.groups)
    groupings, scalings = resolved(GROUPINGS, args.groupings), resolved(SCALINGS, args.scalings)
    tokens, dtype, device = calibration(args, teacher)
    require_statistics(args.statistics, args.ranking, teacher)
    layers = read_layers(args.statistics, args.gram)
    scoring, rankings = rankings_from_dict(read_json(args.ranking), layers)
    plans = [
        make_plan(layers, rankings, grouping, scaling, keep, scoring=scoring, groups=args.groups)
        for grouping, scaling, keep in itertools.product(groupings, scalings, keeps)
    ]
    rows = measure_plans(teacher, plans, tokens, args.batch, dtype, device)
    with atomic_path(args.out) as temporary:
        table = pa.Table.from_pylist(rows)
        about = {"teacher_fingerprint": teacher.fingerprint, "computed_on": computed_on(device)}
        about["tokens_sha256"] = digest_of_tokens(tokens)
        about["rows_sha256"] = digest_of_rows(table.to_pylist())
        pq.write_table(table.replace_schema_metadata({"m2d": json.dumps(about)}), temporary)
    say(f"{args.out}: {len(rows)} configurations, {len({row['plan'] for row in rows})} distinct")


def finite(value: float | None) -> float | None:
    """None in place of what is no number, so that no table takes it for one."""
    return value if value is not None and math.isfinite(value) else None


def measure_plans(
    teacher: Teacher,
    plans: Sequence[Plan],
    tokens: Tensor,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One row per plan, in the order given; equal plans share one measurement.

    tokens [S, T]; `seconds` is what building and measuring the distinct student took.
    """
    distinct = distinct_plans(plans)
    widths = {layer.width(teacher.expert_width) for plan in plans for layer in plan.layers}
    student = GridStudent(teacher, plans[0], max(widths), dtype, device)
    results = {}
    for digest, plan in progress(list(distinct.items()), "grid, students"):
        start = time.monotonic()
        sums = loaded_nll(student.become(plan), tokens, batch, device)
        result = make_result(digest, sums, tokens, dtype, device, None)
        results[digest] = (result, time.monotonic() - start)
    return [
        {
            "teacher": teacher.name,
            "scoring": plan.scoring,
            "grouping": plan.grouping,
            "scaling": plan.scaling,
            "keep": plan.keep,
            "groups": len(plan.layers[0].groups),
            "plan": digest,
            "perplexity": finite(results[digest][0].perplexity),
            "stderr": finite(results[digest][0].stderr),
            "nll": finite(results[digest][0].nll),
            "n_tokens": results[digest][0].n_tokens,
            "dtype": dtype_name(dtype),
            "seconds": results[digest][1],
        }
        for digest, plan in ((plan.digest(), plan) for plan in plans)
    ]
