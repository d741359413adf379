"""`m2d fold-report`: whether folding the router into the gates holds on a teacher, layer by layer.

One pass of calibration tokens; no student is made.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d.artifacts import require_absent, write_json
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.options import add_compute_options
from m2d.refit.fold import FoldTotals, require_foldable, splits_for
from m2d.refit.fold_choice import (
    LEAST_GAIN,
    Candidate,
    SplitSums,
    share_reproduced,
    weighted_errors,
)
from m2d.tokens.calibration import calibration

WAYS = ("unfolded", "alpha 1", "per layer", "per neuron")
SHARED_WAYS = ("shared, unfolded", "shared, per neuron")


class FoldTable(FoldTotals):
    """R2 of every way to fold, by layer."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.rows: list[dict[str, Any]] = []

    def finish(self, layer: int, sums: SplitSums, energy: Tensor) -> None:
        candidates = sums.candidates
        fitted, judged = weighted_errors(sums, energy)
        nothing = torch.zeros_like(sums.fit.tt, dtype=torch.long)
        one = candidates.index(Candidate(1.0))
        best = int(fitted.flatten(1).sum(1).argmin())
        chosen = (nothing, nothing + one, nothing + best, fitted.argmin(0))
        found = [share_reproduced(judged, way, sums, energy) for way in chosen]
        row = {"layer": layer, **dict(zip(WAYS, found, strict=True))}
        self.rows.append({**row, "alpha of the layer": candidates[best].alpha})


def fold_table(stream: StreamedTeacher, tokens: Tensor, batch: int) -> list[dict[str, Any]]:
    """A row per MoE layer: its index, R2 of each of WAYS on held-out tokens, the layer's alpha.

    And R2 of SHARED_WAYS where a shared expert has a gate of its own. Raises UserError for fewer
    than 2 sequences, and where no fold applies.
    """
    family = stream.teacher.family
    require_foldable(stream.teacher)
    held_out = splits_for(tokens)
    totals = FoldTable(held_out, tokens.shape[1], "neuron", 1.0, family.probabilities)
    totals.quiet = True
    stream.run(tokens, batch, totals.visit, "fold-report, layers")
    for row in totals.rows:
        shared = totals.folds[row["layer"]].shared
        if shared is not None:
            found = (shared.report.r2_before, shared.report.r2_after)
            row |= dict(zip(SHARED_WAYS, found, strict=True))
    return totals.rows


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table, and one line of what it says."""
    lines = ["layer  " + "  ".join(f"{way:>10}" for way in WAYS) + "  alpha of the layer"]
    for row in rows:
        cells = "  ".join(f"{row[way]:10.3f}" for way in WAYS)
        lines.append(f"{row['layer']:>5}  {cells}  {row['alpha of the layer']:18.2f}")
    means = {way: sum(row[way] for row in rows) / len(rows) for way in WAYS}
    lines.append(" mean  " + "  ".join(f"{means[way]:10.3f}" for way in WAYS))
    gains = sum(row["alpha 1"] > row["unfolded"] + LEAST_GAIN for row in rows)
    lines.append(
        f"alpha 1 helps in {gains} of {len(rows)} layers: R2 {means['unfolded']:.3f} -> "
        f"{means['alpha 1']:.3f}, per neuron {means['per neuron']:.3f} (share of the routed "
        "neurons' output that a neuron with a constant scale reproduces, on held-out tokens)"
    )
    if SHARED_WAYS[0] in rows[0]:
        before, after = (sum(row[way] for row in rows) / len(rows) for way in SHARED_WAYS)
        lines.append(f"the shared expert's gate: R2 {before:.3f} -> {after:.3f} per neuron")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("--tokens", required=True, help="token file from m2d tokenize")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here")
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    if args.json:
        require_absent(args.json)
    teacher = open_teacher(args.teacher)
    tokens, dtype, device = calibration(args, teacher)
    stream = StreamedTeacher(teacher, dtype, device)
    rows = fold_table(stream, tokens, args.batch)
    if args.json:
        write_json(args.json, {"teacher": teacher.name, "layers": rows})
    print(table_text(rows))
