"""Neuron statistics: what each intermediate neuron of each expert contributes, routed.

One pass of the calibration tokens through the teacher; with a greedy order, a second one. The file
is safetensors, float32, per layer i: layers.{i}.weighted_square_sum [E, I], .down_square_norm
[E, I], .mean_weight [E], and with a greedy order .greedy [n, 2] (int32) and .greedy_gain [n]; its
metadata key "m2d" is as in the Gram statistics, and n_tokens. Definitions: docs/beyond.md.
Shapes: N tokens, E experts, I expert intermediate size, H hidden size.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from m2d.artifacts import atomic_path, reading, sha256_of
from m2d.choose.neuron_statistics import CHOICES, NeuronStatistics
from m2d.choose.neurons import (
    Neurons,
    check_width,
    greedy_neurons,
    routed_contribution,
    top_neurons,
)
from m2d.errors import UserError
from m2d.models.folded import FoldedInTurn, Folds, folds_of
from m2d.models.resume import Keeper, identity, keeper, remove_kept
from m2d.models.routers import shared_weights
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import open_teacher
from m2d.models.visit import Visit
from m2d.models.widths import add_width_options, chosen_width
from m2d.options import add_compute_options, positive
from m2d.progress import say
from m2d.sealed import digest_of, require_digest, require_finite_arrays
from m2d.statistics.files import check_format
from m2d.statistics.identities import require_neurons
from m2d.statistics.moments import Moments
from m2d.statistics.routing import provenance
from m2d.tokens.calibration import calibration

FORMAT = 1
PARTS = ("weighted_square_sum", "down_square_norm", "mean_weight")
CANDIDATES_PER_NEURON = 4


class NeuronTotals:
    """Adds up routed contributions by layer; its `visit` goes to StreamedTeacher.run."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.shared: dict[int, float | None] = {}

    def visit(self, seen: Visit) -> None:
        layer, experts, hidden = seen.layer, seen.experts, seen.hidden
        count = experts.num_experts
        if layer not in self.sums:
            down = experts.down_proj[:count].float()
            squares = torch.zeros(down.shape[0], down.shape[2], dtype=torch.float64)
            self.sums[layer] = {
                "weighted_square_sum": squares.to(hidden.device),
                "down_square_norm": down.square().sum(1),
                "weight_sum": torch.zeros(count, dtype=torch.float64, device=hidden.device),
            }
            self.tokens[layer], self.shared[layer] = 0, None
        sums = self.sums[layer]
        for expert in range(count):
            rows, place = torch.nonzero(seen.index == expert, as_tuple=True)
            if len(rows):
                weight = seen.weights[rows, place].float()
                inner = experts.inner(expert, hidden[rows]).float() * weight[:, None]
                sums["weighted_square_sum"][expert] += inner.square().sum(0)
                sums["weight_sum"][expert] += weight.double().sum()
        self.tokens[layer] += len(hidden)
        shared = shared_weights(seen.router, hidden)
        if shared is not None:
            self.shared[layer] = (self.shared[layer] or 0.0) + float(shared.double().sum())

    def state(self, layer: int) -> dict[str, Any]:
        """A layer's sums (m2d.models.resume.Totals)."""
        sums = {name: value.cpu().numpy() for name, value in self.sums[layer].items()}
        shared = self.shared[layer]
        about = {"tokens": np.array(self.tokens[layer])}
        return about | sums | ({} if shared is None else {"shared": np.array(shared)})

    def restore(self, layer: int, state: dict[str, Any]) -> None:
        """A layer's sums as `state` gave them."""
        self.tokens[layer] = int(state["tokens"])
        self.shared[layer] = float(state["shared"]) if "shared" in state else None
        own = {k: v for k, v in state.items() if k not in ("tokens", "shared")}
        self.sums[layer] = {k: torch.from_numpy(v) for k, v in own.items()}

    def result(self) -> dict[int, NeuronStatistics]:
        """Neuron statistics by layer."""
        return {
            layer: NeuronStatistics(
                layer=layer,
                n_tokens=self.tokens[layer],
                weighted_square_sum=sums["weighted_square_sum"].cpu().numpy(),
                down_square_norm=sums["down_square_norm"].double().cpu().numpy(),
                mean_weight=sums["weight_sum"].cpu().numpy() / self.tokens[layer],
                shared_weight=(
                    1.0
                    if self.shared[layer] is None
                    else (self.shared[layer] or 0.0) / self.tokens[layer]
                ),
            )
            for layer, sums in sorted(self.sums.items())
        }


class CandidateMoments:
    """Adds up h'h and h'y over candidate neurons on every token; `visit` as above.

    The activations are unrouted ones, as a dense student has them, of folded experts where there
    are `folds`; y is the routed output.
    """

    def __init__(self, candidates: Mapping[int, Neurons], folds: Folds | None = None):
        self.candidates, self.folded = candidates, FoldedInTurn(folds)
        self.moments: dict[int, Moments] = {}

    def visit(self, seen: Visit) -> None:
        layer, experts, hidden = seen.layer, seen.experts, seen.hidden
        chosen = torch.from_numpy(self.candidates[layer]).to(hidden.device)
        if layer not in self.moments:
            self.moments[layer] = Moments.zero(len(chosen), hidden.shape[1], hidden.device)
        folded = self.folded.at(seen)
        columns = hidden.new_empty(len(hidden), len(chosen), dtype=torch.float32)
        target = hidden.new_zeros(*hidden.shape, dtype=torch.float32)
        for expert in range(experts.num_experts):
            mine = torch.nonzero(chosen[:, 0] == expert)[:, 0]
            rows, place = torch.nonzero(seen.index == expert, as_tuple=True)
            if not len(mine) and not len(rows):
                continue
            inner = experts.inner(expert, hidden)
            own = inner if folded is experts else folded.inner(expert, hidden)
            columns[:, mine] = own[:, chosen[mine, 1]].float()
            out = nn.functional.linear(inner[rows], *experts.down(expert, hidden.dtype))
            target.index_add_(0, rows, out.float() * seen.weights[rows, place].float()[:, None])
        self.moments[layer].add(columns, target)

    def state(self, layer: int) -> dict[str, Any]:
        """A layer's moments (m2d.models.resume.Totals)."""
        own = self.moments[layer]
        parts = {name: getattr(own, name).cpu().numpy() for name in ("hth", "hty", "yty")}
        return {"n_tokens": np.array(own.n_tokens)} | parts

    def restore(self, layer: int, state: dict[str, Any]) -> None:
        """A layer's moments as `state` gave them."""
        parts = (torch.from_numpy(state[name]) for name in ("hth", "hty", "yty"))
        self.moments[layer] = Moments(int(state["n_tokens"]), *parts)


def collect(
    stream: StreamedTeacher,
    tokens: Tensor,
    batch: int,
    greedy: int | None = None,
    candidates: int | None = None,
    folds: Folds | None = None,
    keep: Keeper | None = None,
) -> list[NeuronStatistics]:
    """Neuron statistics of every MoE layer, from tokens [S, T].

    greedy: also order so many neurons by greedy regression, among the `candidates` of the highest
    contribution (default: four times as many, or all). folds: the experts are folded so; then
    mean_weight is the scale that suits folded experts. Raises UserError where there are not enough.
    """
    teacher = stream.teacher
    totals = NeuronTotals()
    available = teacher.num_experts * teacher.expert_width
    for width in (greedy, candidates):
        if width is not None:
            check_width(width, available)
    stream.run(tokens, batch, totals.visit, "neurons, layers", keep and keep("neurons", totals))
    layers = totals.result()
    for i, fold in (folds or {}).items():
        if fold.folds_routed:
            layers[i] = replace(layers[i], mean_weight=fold.scale.double().numpy())
    if greedy is not None:
        count = min(candidates or CANDIDATES_PER_NEURON * greedy, available)
        chosen = {i: top_neurons(score_of(layer), count) for i, layer in layers.items()}
        second = CandidateMoments(chosen, folds)
        kept = keep and keep(f"greedy {greedy} of {count}", second)
        stream.run(tokens, batch, second.visit, "neurons in greedy order, layers", kept)
        for i, layer in layers.items():
            layers[i] = _ordered(layer, chosen[i], second.moments.pop(i), greedy)
    return list(layers.values())


def score_of(layer: NeuronStatistics) -> Any:
    """Routed contribution [E, I]."""
    return routed_contribution(layer.weighted_square_sum, layer.down_square_norm, layer.n_tokens)


def _ordered(
    layer: NeuronStatistics, candidates: Neurons, moments: Moments, count: int
) -> NeuronStatistics:
    arrays = (moments.hth.cpu().numpy(), moments.hty.cpu().numpy())
    neurons, gains = greedy_neurons(candidates, *arrays, count)
    share = gains / float(moments.yty)
    return replace(layer, greedy=neurons, greedy_gain=share)


def write_neurons(
    path: str | Path, layers: Sequence[NeuronStatistics], metadata: dict[str, Any]
) -> None:
    """Write the file; see the module's docstring."""
    tensors: dict[str, Any] = {}
    for layer in layers:
        for part in PARTS:
            tensors[f"layers.{layer.layer}.{part}"] = getattr(layer, part).astype(np.float32)
        if layer.shared_weight != 1.0:
            shared = np.array([layer.shared_weight], np.float64)
            tensors[f"layers.{layer.layer}.shared_weight"] = shared
        if layer.greedy is not None and layer.greedy_gain is not None:
            tensors[f"layers.{layer.layer}.greedy"] = layer.greedy.astype(np.int32)
            tensors[f"layers.{layer.layer}.greedy_gain"] = layer.greedy_gain.astype(np.float32)
    require_finite_arrays(path, tensors)
    about = {"format": FORMAT, "n_tokens": layers[0].n_tokens, "sha256": digest_of(tensors)}
    about |= metadata
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"m2d": json.dumps(about)})


def read_neurons(path: str | Path) -> tuple[list[NeuronStatistics], dict[str, Any]]:
    """Neuron statistics by layer, and the file's metadata.

    Raises UserError where the file is unreadable or not of this format.
    """
    with reading(path, "a neuron statistics file"):
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})["m2d"])
            check_format(path, metadata, FORMAT)
            tokens = int(metadata["n_tokens"])
            names = set(file.keys())
            require_digest(path, {name: file.get_tensor(name) for name in names}, metadata)
            indices = sorted({int(name.split(".")[1]) for name in names})
            layers = []
            for i in indices:
                parts = {p: file.get_tensor(f"layers.{i}.{p}").astype(np.float64) for p in PARTS}
                if f"layers.{i}.greedy" in names:
                    parts["greedy"] = file.get_tensor(f"layers.{i}.greedy").astype(np.int64)
                    gain = file.get_tensor(f"layers.{i}.greedy_gain")
                    parts["greedy_gain"] = gain.astype(np.float64)
                if f"layers.{i}.shared_weight" in names:
                    parts["shared_weight"] = float(file.get_tensor(f"layers.{i}.shared_weight")[0])
                layers.append(NeuronStatistics(layer=i, n_tokens=tokens, **parts))
        if not layers:
            raise ValueError("it has no layer")
        for layer in layers:
            require_neurons(path, layer)
        return layers, metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--tokens", required=True, help="token file from m2d tokenize")
    parser.add_argument(
        "--choice",
        choices=CHOICES,
        default=CHOICES.default,
        help="greedy: also order as many neurons as the student will have (%(default)s)",
    )
    parser.add_argument("--fold", help="file from m2d fold: of the experts folded so")
    add_width_options(parser)
    parser.add_argument(
        "--candidates", type=positive, help="neurons for greedy to choose from (4 times as many)"
    )
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    greedy = args.choice == "greedy"
    for name in ("width", "params", "multiple", "candidates"):
        if getattr(args, name) and not greedy:
            raise UserError(f"--{name}: is of use with --choice greedy alone")
    teacher = open_teacher(args.teacher)
    width = None
    if greedy:
        width = chosen_width(teacher, args.width, args.params, args.multiple)
    tokens, dtype, device = calibration(args, teacher)
    stream = StreamedTeacher(teacher, dtype, device)
    about = provenance(teacher, args.tokens, dtype)
    folds = None
    if args.fold:
        folds, about["fold_sha256"] = folds_of(teacher, args.fold)[0], sha256_of(args.fold)
    what = identity(teacher.folder, tokens, args.batch, dtype, fold=about.get("fold_sha256"))
    keep = keeper(args.out, what)
    layers = collect(stream, tokens, args.batch, width, args.candidates, folds, keep)
    write_neurons(args.out, layers, about)
    remove_kept(args.out)
    say(f"{args.out}: {len(layers)} layers, {tokens.numel()} tokens")
