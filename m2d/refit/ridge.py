"""Ridge regression of a layer's down projection, from sums over calibration tokens.

Shapes: T tokens, W the student's intermediate size (plus one where a bias is fitted too), H hidden
size. The FFN's output is h D with h [T, W] the intermediate activations and D [W, H] the transposed
down projection; the target is y [T, H]. All is a function of h'h, h'y and y'y.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2d.errors import UserError
from m2d.statistics.moments import Moments

RIDGES = (1.0, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6)


def squared_error(moments: Moments, down: Tensor) -> float:
    """Mean over the tokens of ||y_t - h_t D||^2, for D [W, H]."""
    down = down.to(moments.hth)
    total = moments.yty - 2 * (moments.hty * down).sum() + (down * (moments.hth @ down)).sum()
    return float(total / moments.n_tokens)


def solve_ridge(
    hth: Tensor, hty: Tensor, ridge: float, towards: Tensor | None = None, free: int = 0
) -> Tensor:
    """The D [W, H] that minimises sum_t ||y_t - h_t D||^2 + penalty ||D - towards||^2, float64.

    penalty = ridge * mean(diag h'h); the last `free` rows of D (a bias) are not penalised. With
    `towards` (0 if None) the down projection at hand, its error over these tokens is never raised,
    and directions that the tokens say nothing about stay as they are. Raises
    torch.linalg.LinAlgError when h'h is singular for so small a ridge.
    """
    scale = torch.diagonal(hth).mean() * ridge
    penalty = torch.full((len(hth),), float(scale), dtype=hth.dtype, device=hth.device)
    if free:
        penalty[-free:] = 0.0
    matrix = hth.clone()
    matrix.diagonal().add_(penalty)
    right = hty if towards is None else hty + penalty[:, None] * towards.to(hty)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


@dataclass(frozen=True)
class RidgeChoice:
    """What the held-out tokens said."""

    ridge: float | None
    """The best; None where none improves on the down projection at hand."""
    before: float
    """Mean squared error on the held-out tokens, of the down projection at hand."""
    errors: dict[float, float]
    """Ridge -> mean squared error on the held-out tokens; without those that have no solution."""

    @property
    def after(self) -> float:
        """Mean squared error on the held-out tokens with the choice."""
        return self.before if self.ridge is None else self.errors[self.ridge]


def choose_ridge(
    fit: Moments,
    held_out: Moments,
    current: Tensor,
    ridges: Sequence[float] = RIDGES,
    free: int = 0,
) -> RidgeChoice:
    """The ridge whose solution on `fit` has the least error on `held_out`; of equals, the largest.

    current [W, H]: the down projection at hand, which the ridge draws towards.
    """
    errors: dict[float, float] = {}
    for ridge in sorted(ridges, reverse=True):
        try:
            down = solve_ridge(fit.hth, fit.hty, ridge, current, free)
        except torch.linalg.LinAlgError:
            continue
        errors[ridge] = squared_error(held_out, down)
    before = squared_error(held_out, current)
    best = min(errors, key=errors.__getitem__, default=None)
    if best is not None and not errors[best] < before:
        best = None
    return RidgeChoice(best, before, errors)


def refit_down(
    fit: Moments,
    held_out: Moments,
    current: Tensor,
    ridges: Sequence[float] = RIDGES,
    free: int = 0,
) -> tuple[Tensor, RidgeChoice]:
    """The down projection [W, H], float64, of all tokens, its ridge chosen on the held-out ones.

    `current` itself where no ridge improves on it. Raises UserError when either part has no tokens,
    or they hold NaN or infinity.
    """
    if not fit.n_tokens or not held_out.n_tokens:
        raise UserError("refit needs tokens to fit and to hold out; calibrate on more sequences")
    both = fit + held_out
    if not bool(torch.isfinite(both.hth).all() and torch.isfinite(both.hty).all()):
        raise UserError(
            "refit: the student's activations hold NaN or infinity; use --dtype float32"
        )
    choice = choose_ridge(fit, held_out, current, ridges, free)
    if choice.ridge is None:
        return current.to(both.hth), choice
    return solve_ridge(both.hth, both.hty, choice.ridge, current, free), choice
