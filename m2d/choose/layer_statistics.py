"""What choosing experts works from: the statistics of one MoE layer, as float64 arrays.

Shapes: E routed experts. The definitions are in docs/method.md. Files are read elsewhere
(m2d.statistics); nothing here touches a disk or a model.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from m2d.errors import UserError

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Sums over the calibration tokens t, per routed expert e; every array is [E]."""

    n_tokens: int
    """Calibration tokens, the same for every expert."""
    n_selected: Vector
    """Tokens that selected e: sum_t 1[e in S_t]."""
    prob_sum: Vector
    """sum_t p_te, the router's probability before top-k."""
    prob_sum_selected: Vector
    """The same over the tokens that selected e."""
    weight_sum: Vector
    """sum_t w_te, the weight with which e's output enters the sum (0 when not selected)."""
    out_norm_sum_selected: Vector
    """sum over tokens that selected e of ||f_e(x_t)||."""
    weighted_out_norm_sum: Vector
    """sum_t w_te ||f_e(x_t)||."""
    out_sq_norm_sum_selected: Vector
    """sum over tokens that selected e of ||f_e(x_t)||^2."""
    shared_weight_sum: float | None = None
    """sum_t of the weight that a gate gives the shared expert; None without such a gate."""

    @property
    def shared_weight(self) -> float:
        """The shared expert's mean weight, 1 without a gate."""
        return 1.0 if self.shared_weight_sum is None else self.shared_weight_sum / self.n_tokens


@dataclass(frozen=True, eq=False)
class GramStatistics:
    """Inner products of expert outputs (all experts on every token), weights and router rows."""

    gram: Matrix
    """G [E, E]: mean_t <f_i(x_t), f_j(x_t)>."""
    output_dot: Vector
    """b [E]: mean_t <f_i(x_t), y_t>, y_t the routed output."""
    output_sq_norm: float
    """c: mean_t ||y_t||^2."""
    weight_gram: Matrix
    """W [E, E]: <vec(theta_i), vec(theta_j)>."""
    router_gram: Matrix
    """R [E, E]: <r_i, r_j>."""
    output_norm: Vector | None = None
    """[E]: mean_t ||f_i(x_t)||; None in files made before it was collected."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Both kinds of statistics of one MoE layer.

    Raises UserError when the arrays disagree on E, hold NaN or infinity, or no token was seen.
    """

    layer: int
    """The layer's index in the model."""
    top_k: int
    """k: routed experts that the router selects per token."""
    routing: RoutingStatistics
    gram: GramStatistics

    @property
    def num_experts(self) -> int:
        """E: routed experts of this layer."""
        return len(self.routing.n_selected)

    def __post_init__(self) -> None:
        experts = self.num_experts
        if not 1 <= self.top_k <= experts:
            raise UserError(
                f"layer {self.layer}: top-k is {self.top_k}; it must lie between 1 and the "
                f"{experts} routed experts"
            )
        if self.routing.n_tokens < 1:
            raise UserError(f"layer {self.layer}: the statistics saw no token; calibrate on some")
        for part in (self.routing, self.gram):
            for field in fields(part):
                value = getattr(part, field.name)
                if value is not None:
                    self._check(field.name, value, experts)

    def _check(self, name: str, value: Any, experts: int) -> None:
        array = np.asarray(value)
        matrix = name in ("gram", "weight_gram", "router_gram")
        scalar = name in ("n_tokens", "output_sq_norm", "shared_weight_sum")
        shape = () if scalar else (experts, experts) if matrix else (experts,)
        if array.shape != shape:
            raise UserError(
                f"layer {self.layer}: {name} has shape {list(array.shape)} where {list(shape)} is "
                "expected; are both statistics files of the same teacher?"
            )
        if not np.isfinite(array).all():
            raise UserError(f"layer {self.layer}: {name} holds NaN or infinity; compute it again")
