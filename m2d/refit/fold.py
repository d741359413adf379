"""Fold the router into the experts' gate rows, by how much that helps on held-out tokens.

One pass of calibration tokens through the teacher; m2d/refit/fold_choice.py chooses. A shared
expert whose gate sigmoid(v x) depends on the token is folded in the same way, as one expert that
every token takes, with v in the place of the router's row.

Shapes: N tokens, E routed experts, I an expert's intermediate size, H hidden size.
"""

import argparse
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

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
from m2d.models.visit import Visit
from m2d.options import add_compute_options, number
from m2d.progress import say
from m2d.refit.fold_choice import (
    MODES,
    Choice,
    SplitSums,
    candidates_for,
    candidates_of_shared,
    choose_fold,
)
from m2d.refit.splits import held_out_sequences
from m2d.statistics.routing import provenance
from m2d.tokens.calibration import calibration


class FoldTotals:
    """Chooses each layer's fold; its `visit` goes to StreamedTeacher.run.

    held_out: bool [S], sequences of `length` tokens that judge what the others chose.
    """

    def __init__(self, held_out: Tensor, length: int, mode: str, alpha: float, kind: str):
        if mode not in MODES:
            raise UserError(f"unknown fold {mode!r}; known: {', '.join(MODES)}")
        self.held_out = held_out.repeat_interleave(length)
        self.mode, self.alpha, self.kind = mode, alpha, kind
        self.folds: dict[int, LayerFold] = {}
        self.sums: SplitSums | None = None
        self.shared: SplitSums | None = None  # of the shared expert
        self.seen = 0
        self.quiet = False

    def visit(self, seen: Visit) -> None:
        layer, router, experts, hidden = seen.layer, seen.router, seen.experts, seen.hidden
        count, width = experts.num_experts, experts.down_proj.shape[2]
        if self.sums is None:
            biases = experts.gate_up_bias is not None
            candidates = candidates_for(self.mode, self.alpha, self.kind, biases)
            self.sums = SplitSums.zero(candidates, count, width, hidden.device)
        held_out = self.held_out[self.seen : self.seen + len(hidden)].to(hidden.device)
        routes = [router_directions(router, centred) for centred in (False, True)]
        plain, centred = (functional.linear(hidden.float(), *route) for route in routes)
        dense = hidden.new_zeros(len(hidden), count, dtype=torch.float32)
        dense.scatter_(1, seen.index, seen.weights.float())
        for expert in range(count):
            gate_up = experts.gate_up(expert, hidden).float()
            logits = (plain[:, [expert]], centred[:, [expert]])
            weight = dense[:, [expert]]
            self.sums.add(expert, gate_up, logits, experts.glu, weight, held_out)
        if isinstance(router, RouterRows) and router.shared_gate is not None:
            self.add_shared(router, experts, hidden, held_out)
        self.seen += len(hidden)
        if self.seen == len(self.held_out):  # the layer is through
            energy = experts.down_proj[:count].float().square().sum(1).double()
            self.finish(layer, self.sums, energy)
            fold = choose_fold(layer, self.mode, self.sums, energy)
            shared = self.fold_of_shared(layer, router)
            self.folds[layer] = as_layer_fold(fold, *routes[fold.report.centred], shared)
            self.sums, self.shared, self.seen = None, None, 0
            if not self.quiet:
                say(describe(self.folds[layer]))

    def add_shared(
        self, router: RouterRows, experts: StackedExperts, hidden: Tensor, held_out: Tensor
    ) -> None:
        """Add a batch's tokens to the sums of the shared expert."""
        assert router.shared_gate is not None
        halves = [projection.weight.to(hidden.dtype) for projection in projections_of(router)[:2]]
        gate_up = functional.linear(hidden, torch.cat(halves)).float()
        if self.shared is None:
            candidates = candidates_of_shared(self.mode, self.alpha)
            width = gate_up.shape[1] // 2
            self.shared = SplitSums.zero(candidates, 1, width, hidden.device)
        logit = functional.linear(hidden.float(), router.shared_gate.float())  # [N, 1]
        self.shared.add(0, gate_up, (logit, logit), experts.glu, logit.sigmoid(), held_out)

    def fold_of_shared(self, layer: int, router: nn.Module) -> LayerFold | None:
        """The shared expert's fold, where it has a gate."""
        if self.shared is None:
            return None
        assert isinstance(router, RouterRows)
        assert router.shared_gate is not None
        energy = projections_of(router)[2].weight.double().square().sum(0)[None]
        fold = choose_fold(layer, self.mode, self.shared, energy)
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

    def finish(self, layer: int, sums: SplitSums, energy: Tensor) -> None:
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
            "folded into their gates"
        )


def router_directions(router: nn.Module, centred: bool) -> tuple[Tensor, Tensor]:
    """a_e [E, H] and the same of the router's bias [E], float32."""
    rows = cast(Tensor, router.weight).detach().float()
    bias = getattr(router, "bias", None)
    offset = rows.new_zeros(len(rows)) if bias is None else bias.detach().float()
    return (rows - rows.mean(0), offset - offset.mean()) if centred else (rows, offset)


def as_layer_fold(
    choice: Choice, rows: Tensor, offset: Tensor, shared: LayerFold | None = None
) -> LayerFold:
    """The fold with the router's rows [E, H] and offset [E]; float32, on the CPU."""
    parts = dict(zip(PARTS, (choice.alpha, rows, offset, choice.shift, choice.scale), strict=True))
    own: dict[str, Any] = {name: tensor.cpu().float() for name, tensor in parts.items()}
    return LayerFold(choice.report, **own, shared=shared)


def splits_for(tokens: Tensor) -> Tensor:
    """Which sequences are held out, bool [S]. Raises UserError for fewer than 2."""
    if len(tokens) < 2:
        raise UserError("folding needs at least 2 sequences: some to fit, some to hold out")
    return held_out_sequences(len(tokens))


def collect_folds(
    stream: StreamedTeacher,
    tokens: Tensor,
    batch: int,
    mode: str = "fixed",
    alpha: float = 1.0,
    keep: Keeper | None = None,
) -> dict[int, LayerFold]:
    """The fold of every MoE layer, from tokens [S, T]; every eighth sequence is held out.

    mode: "fixed" takes `alpha` everywhere, "layer" and "neuron" fit it. Layers that gain nothing on
    the held-out tokens are left as they are. Raises UserError for fewer than 2 sequences.
    """
    family = stream.teacher.family
    require_foldable(stream.teacher)
    held_out = splits_for(tokens)
    totals = FoldTotals(held_out, tokens.shape[1], mode, alpha, family.probabilities)
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
    tokens, dtype, device = calibration(args, teacher)
    stream = StreamedTeacher(teacher, dtype, device)
    what = identity(teacher.folder, tokens, args.batch, dtype, fold=args.mode, alpha=args.alpha)
    keep = keeper(args.out, what)
    folds = collect_folds(stream, tokens, args.batch, args.mode, args.alpha, keep=keep)
    about = provenance(teacher, args.tokens, dtype)
    write_folds(args.out, folds, about | fold_record(args.mode, tokens, folds))
    remove_kept(args.out)
    say(f"{args.out}: {len(folds)} layers, {tokens.numel()} tokens")
