"""Which fold a layer takes, from sums over tokens of what its neurons give.

For every neuron, t = w_e h_j is what it gives in the teacher (0 where its expert is not selected),
and f what the folded neuron gives on every token. Whatever alpha is, the best constant scale and
the error that it leaves follow from the sums of t f, f f and t t.

Shapes: N tokens, E routed experts, I an expert's intermediate size, C candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2d.errors import UserError
from m2d.models.experts import Glu
from m2d.models.folded import FoldReport

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


@dataclass
class SplitSums:
    """The sums of every candidate, apart for the tokens that fit a fold and the held-out ones."""

    candidates: list[Candidate]
    fit: FoldSums
    judge: FoldSums

    @classmethod
    def zero(
        cls, candidates: list[Candidate], experts: int, width: int, device: torch.device
    ) -> "SplitSums":
        """The sums of no token at all."""
        fit, judge = (FoldSums.zero(len(candidates), experts, width, device) for _ in range(2))
        return cls(candidates, fit, judge)

    def add(
        self,
        expert: int,
        gate_up: Tensor,
        logits: tuple[Tensor, Tensor],
        glu: Glu,
        weights: Tensor,
        held_out: Tensor,
    ) -> None:
        """Add tokens of one expert: what its gate and up projections give [N, 2 I], float32.

        logits: what alpha multiplies [N, 1], as it is and less the mean; weights [N, 1]: those of
        the teacher; held_out: bool [N].
        """
        width = gate_up.shape[1] // 2
        found = []
        for candidate in self.candidates:
            moved = gate_up.clone()
            moved[:, :width] += candidate.alpha * logits[candidate.centred] + candidate.shift
            found.append(glu(moved))
        target = found[0] * weights
        for part, chosen in ((self.fit, ~held_out), (self.judge, held_out)):
            part.add(expert, target[chosen], [f[chosen] for f in found])


@dataclass(frozen=True)
class Choice:
    """A layer's fold but for the router's rows: alpha and shift [E, I], scale [E]."""

    report: FoldReport
    alpha: Tensor
    shift: Tensor
    scale: Tensor


def choose_fold(layer: int, mode: str, sums: SplitSums, energy: Tensor) -> Choice:
    """The fold that fits best, or none at all where nothing is gained on the held-out tokens.

    mode: "fixed" takes the one alpha tried; "layer" one candidate for all neurons; "neuron" one for
    each, if that too is better than one for all. energy [E, I]: ||d_ej||^2 of the down columns.
    """
    candidates, fit = sums.candidates, sums.fit
    fitted, judged = weighted_errors(sums, energy)

    def r2(chosen: Tensor) -> float:
        return share_reproduced(judged, chosen, sums, energy)

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


def weighted_errors(sums: SplitSums, energy: Tensor) -> tuple[Tensor, Tensor]:
    """[C, E, I] of either part, with the scales that fit best."""
    scales = sums.fit.scales()
    return energy * sums.fit.errors(scales), energy * sums.judge.errors(scales)


def share_reproduced(judged: Tensor, chosen: Tensor, sums: SplitSums, energy: Tensor) -> float:
    """R2 of a layer whose neurons take the candidates `chosen` [E, I].

    Raises UserError where the sums are not finite.
    """
    total = float((energy * sums.judge.tt).sum())
    if not math.isfinite(total):
        raise UserError("the experts give numbers that are not finite; compute in another --dtype")
    return 1 - float(judged.gather(0, chosen[None]).sum()) / total if total > 0 else 0.0
