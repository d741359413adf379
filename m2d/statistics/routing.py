"""Routing statistics: one pass of the calibration tokens through the teacher.

Definitions: docs/method.md. Sums are float64 or better, so that shares of the tokens add up.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2d import __version__
from m2d.artifacts import sha256_of
from m2d.choose.layer_statistics import RoutingStatistics
from m2d.devices import computed_on, dtype_name
from m2d.models.resume import Kept, identity, remove_kept
from m2d.models.routers import PROBABILITIES, router_gram, router_logits, shared_weights
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import Teacher, open_teacher
from m2d.models.visit import Visit
from m2d.options import add_compute_options
from m2d.progress import say
from m2d.statistics.shards import (
    LayerSums,
    LayerTotals,
    parse_share,
    routing_statistics,
    share_rows,
    write_share,
    write_statistics,
)
from m2d.tokens.calibration import calibration


def routing_sums(
    probabilities: Tensor, index: Tensor, weights: Tensor, norms: Tensor
) -> dict[str, Tensor]:
    """The sums over one batch, each float64 [E] (n_tokens: a scalar).

    probabilities p [N, E], index S [N, k], weights w [N, k], norms ||f_e(x)|| [N, k].
    """
    tokens, experts = probabilities.shape
    flat = index.reshape(-1)

    def by_expert(values: Tensor) -> Tensor:
        sums = torch.zeros(experts, dtype=torch.float64, device=index.device)
        return sums.index_add_(0, flat, values.double().reshape(-1))

    norms = norms.double()
    # A weight of 0 stands for an expert that was not taken (Zaya, where a token takes none).
    taken = (weights != 0).double()
    return {
        "n_tokens": torch.tensor(tokens, dtype=torch.float64),
        "n_selected": by_expert(taken),
        "prob_sum": probabilities.double().sum(0),
        "prob_sum_selected": by_expert(probabilities.gather(1, index).double() * taken),
        "weight_sum": by_expert(weights),
        "out_norm_sum_selected": by_expert(norms * taken),
        "weighted_out_norm_sum": by_expert(weights.double() * norms),
        "out_sq_norm_sum_selected": by_expert(norms.square() * taken),
    }


class RoutingTotals(LayerTotals):
    """Adds up `routing_sums` of every batch, by layer; its `visit` goes to StreamedTeacher.run."""

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.probabilities = PROBABILITIES[teacher.family.probabilities]
        self.float32 = teacher.family.router_float32

    def visit(self, seen: Visit) -> None:
        if seen.layer not in self.layers:
            # A share's mark of its teacher; no part of the finished statistics.
            rows = router_gram(seen.router).cpu().numpy()
            self.layers[seen.layer] = LayerSums(same={"router_gram": rows})
        logits = router_logits(seen.router, seen.hidden, self.float32)
        batch = routing_sums(self.probabilities(logits), seen.index, seen.weights, seen.norms)
        shared = shared_weights(seen.router, seen.hidden)
        if shared is not None:
            batch["shared_weight_sum"] = shared.double().sum()
        self.layers[seen.layer].add({name: value.cpu().numpy() for name, value in batch.items()})

    def result(self) -> dict[int, RoutingStatistics]:
        """Routing statistics by layer."""
        return {index: routing_statistics(layer) for index, layer in self.layers.items()}


def provenance(teacher: Teacher, calibration: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """What a statistics file says of its making."""
    return {
        "model_type": teacher.family.model_type,
        "num_experts": teacher.num_experts,
        "top_k": teacher.top_k,
        "dtype": dtype_name(dtype),
        "calibration_sha256": sha256_of(calibration),
        "teacher_fingerprint": teacher.fingerprint,
        "computed_on": computed_on(),
        "m2d_version": __version__,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the file to write, .parquet")
    add_statistics_options(parser)


def add_statistics_options(parser: argparse.ArgumentParser) -> None:
    """--tokens, --share and the compute options."""
    parser.add_argument("--tokens", required=True, help="token file from m2d tokenize")
    parser.add_argument(
        "--share",
        type=parse_share,
        metavar="I/N",
        help="take this share of the sequences alone, and write a share's file (.safetensors); "
        "m2d combine adds up all N",
    )
    add_compute_options(parser)


def collect(args: argparse.Namespace, kind: str, make: Callable[[Teacher], Any]) -> None:
    """Run the calibration tokens, or a share of them, through the teacher and write the sums.

    make(teacher) gives the totals: an object with `visit` and `layers`.
    """
    teacher = open_teacher(args.teacher)
    tokens, dtype, device = calibration(args, teacher)
    rows = slice(0, len(tokens))
    if args.share:
        rows = share_rows(args.share, len(tokens), args.batch)
    totals, about = make(teacher), provenance(teacher, args.tokens, dtype)
    if getattr(args, "fold", None):
        about["fold_sha256"] = sha256_of(args.fold)
    stream = StreamedTeacher(teacher, dtype, device)
    what = identity(
        teacher.folder, tokens[rows], args.batch, dtype,
        kind=kind, fold=about.get("fold_sha256"),
    )  # fmt: skip
    kept = Kept(args.out, totals, what)
    stream.run(tokens[rows], args.batch, None, f"{kind} statistics, layers", kept)
    if args.share:
        about["share"] = [rows.start, rows.stop, len(tokens)]
        write_share(args.out, kind, totals.layers, about)
    else:
        write_statistics(args.out, kind, totals.layers, about)
    remove_kept(args.out)
    say(f"{args.out}: {len(totals.layers)} layers, {tokens[rows].numel()} tokens")


def main(args: argparse.Namespace) -> None:
    collect(args, "routing", RoutingTotals)
