"""Routing statistics: one pass of the calibration tokens through the teacher.

Definitions: docs/method.md. Sums are float64, so that shares of the tokens add up.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from m2d import __version__
from m2d.artifacts import sha256_of
from m2d.choose.inputs import RoutingStatistics
from m2d.models.experts import StackedExperts
from m2d.models.routers import PROBABILITIES, router_logits
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import Teacher, open_teacher, pick_device, pick_dtype
from m2d.options import add_compute_options
from m2d.progress import say
from m2d.statistics import write_routing
from m2d.tokens import read_tokens


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
    return {
        "n_tokens": torch.tensor(tokens),
        "n_selected": by_expert(torch.ones_like(norms)),
        "prob_sum": probabilities.double().sum(0),
        "prob_sum_selected": by_expert(probabilities.gather(1, index)),
        "weight_sum": by_expert(weights),
        "out_norm_sum_selected": by_expert(norms),
        "weighted_out_norm_sum": by_expert(weights.double() * norms),
        "out_sq_norm_sum_selected": by_expert(norms.square()),
    }


class RoutingTotals:
    """Adds up `routing_sums` of every batch, by layer; its `visit` goes to StreamedTeacher.run."""

    def __init__(self, teacher: Teacher):
        self.probabilities = PROBABILITIES[teacher.family.probabilities]
        self.float32 = teacher.family.router_float32
        self.sums: dict[int, dict[str, Tensor]] = {}

    def visit(
        self,
        layer: int,
        router: nn.Module,
        experts: StackedExperts,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        norms: Tensor,
    ) -> None:
        logits = router_logits(router, hidden, self.float32)
        batch = routing_sums(self.probabilities(logits), index, weights, norms)
        total = self.sums.setdefault(
            layer, {name: torch.zeros_like(v) for name, v in batch.items()}
        )
        for name, value in batch.items():
            total[name] += value

    def result(self) -> dict[int, RoutingStatistics]:
        """Routing statistics by layer."""
        return {
            layer: RoutingStatistics(
                n_tokens=int(sums["n_tokens"]),
                **{
                    name: np.asarray(value.cpu())
                    for name, value in sums.items()
                    if name != "n_tokens"
                },
            )
            for layer, sums in self.sums.items()
        }


def provenance(teacher: Teacher, calibration: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """What a statistics file says of its making."""
    return {
        "model_type": teacher.family.model_type,
        "num_experts": teacher.num_experts,
        "top_k": teacher.top_k,
        "dtype": str(dtype).removeprefix("torch."),
        "calibration_sha256": sha256_of(calibration),
        "m2d_version": __version__,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the file to write, .parquet")
    parser.add_argument("--calibration", required=True, help="token file from m2d calibrate")
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    teacher = open_teacher(args.teacher)
    tokens = read_tokens(args.calibration, teacher.config.vocab_size)
    dtype = pick_dtype(args.dtype, teacher.dtype)
    totals = RoutingTotals(teacher)
    stream = StreamedTeacher(teacher, dtype, pick_device(args.device))
    stream.run(tokens, args.batch, totals.visit, "routing statistics, layers")
    write_routing(args.out, totals.result(), provenance(teacher, args.calibration, dtype))
    say(f"{args.out}: {len(totals.sums)} layers, {tokens.numel()} tokens")
