"""Fold the router into the experts' gate rows, by how much that helps on held-out tokens.

One pass of calibration tokens through the teacher. For every neuron, t = w_e h_j is what it gives
in the teacher (0 where its expert is not selected), and f what the folded neuron gives on every
token. Whatever alpha is, the best constant scale and the error that it leaves follow from the sums
of t f, f f and t t. A shared expert whose gate sigmoid(v x) depends on the token is folded in the
same way, as one expert that every token takes, with v in the place of the router's row.

Shapes: N tokens, E routed experts, I an expert's intermediate size, H hidden size, C candidates.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from m2d.devices import compute_dtype, pick_device
from m2d.errors import UserError
from m2d.models.experts import StackedExperts
from m2d.models.folded import (
    PARTS,
    FoldReport,
    LayerFold,
    fold_of,
    report_of,
    reports,
    tensors_of,
    write_folds,
)
from m2d.models.resume import Keeper, identity, keeper, remove_kept
from m2d.models.routers import RouterRows
from m2d.models.stream import StreamedTeacher
from m2d.models.teacher import Teacher, layers_of, open_teacher
from m2d.options import add_compute_options, number
from m2d.progress import say
from m2d.refit.splits import HELD_OUT_EVERY, held_out_sequences
from m2d.statistics.routing import provenance
from m2d.tokens.files import read_tokens

ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0)
SHIFTS = (0.0, -1.0, -2.0)  # of the gate's bias, in families that have one
SHARED_ALPHAS = (0.25, *ALPHAS)  # of a shared expert's gate, which never closes altogether
LEAST_GAIN = 1e-3  # of a layer's R2; less is noise
MODES = ("fixed", "layer", "neuron")


@dataclass(frozen=True)
class Candidate:
    """One way to fold: gate row + alpha (router row - mean row, if centred), bias + shift."""

    alpha: float
    shift: float = 0.0
    centred: bool = True


UNFOLDED = Candidate(0.0)


def candidates_for(mode: str, alpha: float, kind: str, biases: bool) -> list[Candidate]:
    """The unfolded neuron first, then what is tried.

    A softmax does not change when all logits move together, so only differences from the mean can
    matter; a sigmoid's logits mean something by themselves, and both are tried.
    """
    alphas = (alpha,) if mode == "fixed" else ALPHAS
    shifts = SHIFTS if biases and mode != "fixed" else (0.0,)
    centred = (True, False) if kind == "sigmoid" else (True,)
    return [UNFOLDED] + [Candidate(a, s, c) for c in centred for a in alphas for s in shifts if a]


def candidates_of_shared(mode: str, alpha: float) -> list[Candidate]:
    """The same for a shared expert's gate, a sigmoid of one number."""
    alphas = (alpha,) if mode == "fixed" else SHARED_ALPHAS
    return [UNFOLDED] + [Candidate(a, centred=False) for a in alphas if a]


@dataclass
class FoldSums:
    """Sums over tokens, float64: tt [E, I]; tf and ff [C, E, I]."""

    tt: Tensor
    tf: Tensor
    ff: Tensor

    @classmethod
    def zero(cls, candidates: int, experts: int, width: int, device: torch.device) -> "FoldSums":
        """The sums of no token at all."""
        shape = (candidates, experts, width)
        tf, ff = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        return cls(torch.zeros(shape[1:], dtype=torch.float64, device=device), tf, ff)

    def add(self, expert: int, target: Tensor, found: Sequence[Tensor]) -> None:
        """Add tokens of one expert: t [N, I], and each candidate's f [N, I]."""
        self.tt[expert] += target.square().sum(0)
        for i, f in enumerate(found):
            self.tf[i, expert] += (target * f).sum(0)
            self.ff[i, expert] += f.square().sum(0)

    def scales(self) -> Tensor:
        """[C, E, I]: the constant by which f comes nearest to t; 0 where f is."""
        return torch.where(self.ff > 0, self.tf / self.ff.clamp_min(1e-300), 0.0)

    def errors(self, scales: Tensor) -> Tensor:
        """[C, E, I]: sum of (t - s f)^2."""
        return self.tt - 2 * scales * self.tf + scales.square() * self.ff


class FoldTotals:
    """Chooses each layer's fold; its `visit` goes to StreamedTeacher.run.

    held_out: bool [S], sequences of `length` tokens that judge what the others chose.
    """

    def __init__(
        self, held_out: Tensor, length: int, mode: str, alpha: float, kind: str, float32: bool
    ):
        if mode not in MODES:
            raise UserError(f"unknown fold {mode!r}; known: {', '.join(MODES)}")
        self.held_out = held_out.repeat_interleave(length)
        self.mode, self.alpha, self.kind, self.float32 = mode, alpha, kind, float32
        self.folds: dict[int, LayerFold] = {}
        self.parts: tuple[FoldSums, FoldSums] | None = None  # to fit, held out
        self.shared: tuple[FoldSums, FoldSums] | None = None  # the same of the shared expert
        self.seen = 0
        self.quiet = False

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
        biases = experts.gate_up_bias is not None
        candidates = candidates_for(self.mode, self.alpha, self.kind, biases)
        count, width = experts.num_experts, experts.down_proj.shape[2]
        if self.parts is None:
            sizes = (len(candidates), count, width, hidden.device)
            self.parts = (FoldSums.zero(*sizes), FoldSums.zero(*sizes))
        held_out = self.held_out[self.seen : self.seen + len(hidden)].to(hidden.device)
        routes = [router_directions(router, centred) for centred in (True, False)]
        shares = [functional.linear(hidden.float(), rows, offset) for rows, offset in routes]
        dense = hidden.new_zeros(len(hidden), count, dtype=torch.float32)
        dense.scatter_(1, index, weights.float())
        for expert in range(count):
            gate_up = experts.gate_up(expert, hidden).float()
            found = []
            for candidate in candidates:
                moved = gate_up.clone()
                share = shares[0 if candidate.centred else 1][:, expert, None]
                moved[:, :width] += candidate.alpha * share + candidate.shift
                found.append(experts.glu(moved))
            target = found[0] * dense[:, expert, None]
            for part, chosen in zip(self.parts, (~held_out, held_out), strict=True):
                part.add(expert, target[chosen], [f[chosen] for f in found])
        if isinstance(router, RouterRows) and router.shared_gate is not None:
            self.add_shared(router, experts, hidden, held_out)
        self.seen += len(hidden)
        if self.seen == len(self.held_out):  # the layer is through
            energy = experts.down_proj[:count].float().square().sum(1)
            fit, judge = self.parts
            self.finish(layer, candidates, fit, judge, energy.double())
            fold = choose_fold(layer, self.mode, candidates, fit, judge, energy.double())
            rows, offset = routes[0 if fold.report.centred else 1]
            shared = self.fold_of_shared(layer, router)
            self.folds[layer] = as_layer_fold(fold, rows, offset, shared)
            self.parts, self.shared, self.seen = None, None, 0
            if not self.quiet:
                say(describe(self.folds[layer]))

    def add_shared(
        self, router: RouterRows, experts: StackedExperts, hidden: Tensor, held_out: Tensor
    ) -> None:
        """Add a batch's tokens to the sums of the shared expert."""
        assert router.shared_gate is not None
        halves = [projection.weight.to(hidden.dtype) for projection in projections_of(router)[:2]]
        gate_up = functional.linear(hidden, torch.cat(halves)).float()
        width = gate_up.shape[1] // 2
        logit = functional.linear(hidden.float(), router.shared_gate.float())  # [N, 1]
        candidates = candidates_of_shared(self.mode, self.alpha)
        if self.shared is None:
            sizes = (len(candidates), 1, width, hidden.device)
            self.shared = (FoldSums.zero(*sizes), FoldSums.zero(*sizes))
        found = []
        for candidate in candidates:
            moved = gate_up.clone()
            moved[:, :width] += candidate.alpha * logit
            found.append(experts.glu(moved))
        target = found[0] * logit.sigmoid()
        for part, chosen in zip(self.shared, (~held_out, held_out), strict=True):
            part.add(0, target[chosen], [f[chosen] for f in found])

    def fold_of_shared(self, layer: int, router: nn.Module) -> LayerFold | None:
        """The shared expert's fold, where it has a gate."""
        if self.shared is None:
            return None
        assert isinstance(router, RouterRows)
        assert router.shared_gate is not None
        energy = projections_of(router)[2].weight.double().square().sum(0)[None]
        candidates = candidates_of_shared(self.mode, self.alpha)
        fold = choose_fold(layer, self.mode, candidates, *self.shared, energy)
        row = router.shared_gate.detach().float()
        return as_layer_fold(fold, row, row.new_zeros(1))

    def state(self, layer: int) -> dict[str, Any]:
        """A layer's fold (m2d.models.resume.Totals)."""
        fold = self.folds[layer]
        report = np.frombuffer(json.dumps(report_of(fold)).encode(), np.uint8)
        return {"report": report} | {n: tensor.numpy() for n, tensor in tensors_of(fold).items()}

    def restore(self, layer: int, state: dict[str, Any]) -> None:
        """A layer's fold as `state` gave it."""
        tensors = {n: torch.from_numpy(array) for n, array in state.items() if n != "report"}
        self.folds[layer] = fold_of(json.loads(state["report"].tobytes()), tensors)

    def finish(
        self,
        layer: int,
        candidates: Sequence[Candidate],
        fit: FoldSums,
        judge: FoldSums,
        energy: Tensor,
    ) -> None:
        """Called with a layer's sums once they are whole; `m2d fold-report` looks at them here."""


def projections_of(router: RouterRows) -> list[nn.Linear]:
    """The shared expert's gate, up and down projection."""
    assert router.shared_expert is not None
    names = ("gate_proj", "up_proj", "down_proj")
    return [cast(nn.Linear, router.shared_expert.get_submodule(name)) for name in names]


def require_foldable(teacher: Teacher) -> None:
    """Raise a UserError where the router's rows are of another space than the experts' inputs."""
    family = teacher.family
    layer = layers_of(teacher.skeleton)[teacher.moe_layers[0]]
    size = layer.get_submodule(family.router).get_parameter("weight").shape[1]
    if size != teacher.expert_size:
        raise UserError(
            f"{family.model_type}: its router does not read what its experts read, so it cannot be "
            "folded into their gates; leave out fold"
        )


def router_directions(router: nn.Module, centred: bool) -> tuple[Tensor, Tensor]:
    """a_e [E, H] and the same of the router's bias [E], float32."""
    rows = cast(Tensor, router.weight).detach().float()
    bias = getattr(router, "bias", None)
    offset = rows.new_zeros(len(rows)) if bias is None else bias.detach().float()
    return (rows - rows.mean(0), offset - offset.mean()) if centred else (rows, offset)


@dataclass(frozen=True)
class Choice:
    """A layer's fold but for the router's rows: alpha and shift [E, I], scale [E]."""

    report: FoldReport
    alpha: Tensor
    shift: Tensor
    scale: Tensor


def as_layer_fold(
    choice: Choice, rows: Tensor, offset: Tensor, shared: LayerFold | None = None
) -> LayerFold:
    """The fold with the router's rows [E, H] and offset [E]; float32, on the CPU."""
    parts = dict(zip(PARTS, (choice.alpha, rows, offset, choice.shift, choice.scale), strict=True))
    own: dict[str, Any] = {name: tensor.cpu().float() for name, tensor in parts.items()}
    return LayerFold(choice.report, **own, shared=shared)


def choose_fold(
    layer: int,
    mode: str,
    candidates: Sequence[Candidate],
    fit: FoldSums,
    judge: FoldSums,
    energy: Tensor,
) -> Choice:
    """The fold that `fit` finds best, or none at all where `judge`, the held-out tokens, gains
    nothing.

    mode: "fixed" takes the one alpha tried; "layer" one candidate for all neurons; "neuron" one for
    each, if that too is better than one for all. energy [E, I]: ||d_ej||^2 of the down columns.
    """
    fitted, judged = weighted_errors(fit, judge, energy)

    def r2(chosen: Tensor) -> float:
        return share_reproduced(judged, chosen, judge, energy)

    nothing = torch.zeros_like(fit.tt, dtype=torch.long)
    best, kind, before = nothing, "none", r2(nothing)
    after, centred = before, True
    for way in (True, False):
        own = [i for i, c in enumerate(candidates) if i and c.centred == way]
        if not own:
            continue
        one = min(own, key=lambda i: float(fitted[i].sum()))
        options = [("fixed" if mode == "fixed" else "layer", nothing + one)]
        if mode == "neuron":
            subset = torch.tensor([0, *own], device=fitted.device)
            options.append(("neuron", subset[fitted[subset].argmin(0)]))
        for name, chosen in options:
            gained = r2(chosen)
            if gained > after + LEAST_GAIN:
                best, kind, after, centred = chosen, name, gained, way
    table = torch.tensor(
        [(c.alpha, c.shift) for c in candidates], dtype=torch.float64, device=energy.device
    )
    alpha, shift = table[best].unbind(-1)
    tf, ff = (sums.gather(0, best[None])[0] * energy for sums in (fit.tf, fit.ff))
    scale = tf.sum(1) / ff.sum(1).clamp_min(1e-300)
    weight = energy * fit.tt
    mean = float((alpha * weight).sum() / weight.sum().clamp_min(1e-300))
    report = FoldReport(layer, kind, centred, mean, before, after)
    return Choice(report, alpha, shift, scale)


def weighted_errors(fit: FoldSums, judge: FoldSums, energy: Tensor) -> tuple[Tensor, Tensor]:
    """[C, E, I] of either part, with the scales that `fit` finds best."""
    scales = fit.scales()
    return energy * fit.errors(scales), energy * judge.errors(scales)


def share_reproduced(judged: Tensor, chosen: Tensor, judge: FoldSums, energy: Tensor) -> float:
    """R2 of a layer whose neurons take the candidates `chosen` [E, I].

    Raises UserError where the sums are not finite.
    """
    total = float((energy * judge.tt).sum())
    if not math.isfinite(total):
        raise UserError("the experts give numbers that are not finite; compute in another --dtype")
    return 1 - float(judged.gather(0, chosen[None]).sum()) / total if total > 0 else 0.0


def splits_for(tokens: Tensor, held_out_every: int = HELD_OUT_EVERY) -> Tensor:
    """Which sequences are held out, bool [S]. Raises UserError for fewer than 2."""
    if len(tokens) < 2:
        raise UserError("folding needs at least 2 sequences: some to fit, some to hold out")
    return held_out_sequences(len(tokens), held_out_every)


def collect_folds(
    stream: StreamedTeacher,
    tokens: Tensor,
    batch: int,
    mode: str = "fixed",
    alpha: float = 1.0,
    held_out_every: int = HELD_OUT_EVERY,
    keep: Keeper | None = None,
) -> dict[int, LayerFold]:
    """The fold of every MoE layer, from tokens [S, T]; every n-th sequence is held out.

    mode: "fixed" takes `alpha` everywhere, "layer" and "neuron" fit it. Layers that gain nothing on
    the held-out tokens are left as they are. Raises UserError for fewer than 2 sequences.
    """
    family = stream.teacher.family
    require_foldable(stream.teacher)
    held_out = splits_for(tokens, held_out_every)
    totals = FoldTotals(
        held_out, tokens.shape[1], mode, alpha, family.probabilities, family.router_float32
    )
    stream.run(tokens, batch, totals.visit, "folding, layers", keep and keep("fold", totals))
    return totals.folds


def describe(fold: LayerFold) -> str:
    """One line on a layer."""
    parts = [_describe(fold.report)]
    if fold.shared is not None:
        parts.append(f"shared expert: {_describe(fold.shared.report)}")
    return f"layer {fold.report.layer}: {'; '.join(parts)}"


def _describe(report: FoldReport) -> str:
    if report.choice == "none":
        return f"R2 {report.r2_before:.3f}, left as it is"
    return (
        f"R2 {report.r2_before:.3f} -> {report.r2_after:.3f}, "
        f"alpha {report.alpha:.2f} ({report.choice})"
    )


def fold_record(mode: str, tokens: Tensor, folds: dict[int, LayerFold]) -> dict[str, Any]:
    """What m2d.json says of a fold."""
    return {
        "mode": mode,
        "sequences": tokens.shape[0],
        "length": tokens.shape[1],
        "layers": reports(folds),
    }


def add_mode_options(parser: argparse.ArgumentParser) -> None:
    """--mode and --alpha."""
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="neuron",
        help="fixed: --alpha in every layer; layer, neuron: fitted on the tokens (%(default)s)",
    )
    parser.add_argument("--alpha", type=number, default=1.0, help="for --mode fixed (%(default)s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--tokens", required=True, help="token file from m2d tokenize")
    add_mode_options(parser)
    add_compute_options(parser)


def main(args: argparse.Namespace) -> None:
    teacher = open_teacher(args.teacher)
    tokens = read_tokens(args.tokens, teacher.config.vocab_size)
    device = pick_device(args.device)
    dtype = compute_dtype(args.dtype, teacher.dtype, device)
    stream = StreamedTeacher(teacher, dtype, device)
    what = identity(teacher.folder, tokens, args.batch, dtype, fold=args.mode, alpha=args.alpha)
    keep = keeper(args.out, what)
    folds = collect_folds(stream, tokens, args.batch, args.mode, args.alpha, keep=keep)
    about = provenance(teacher, args.tokens, dtype)
    record = {"mode": args.mode, "sequences": tokens.shape[0], "length": tokens.shape[1]}
    write_folds(args.out, folds, {**about, **record})
    remove_kept(args.out)
    say(f"{args.out}: {len(folds)} layers, {tokens.numel()} tokens")
