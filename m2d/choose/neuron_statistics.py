"""What choosing neurons works from: the statistics of one MoE layer, as float64 arrays.

Shapes: E routed experts, I an expert's intermediate size, n neurons in an order of choice.
"""

from dataclasses import dataclass

from m2d.choose.layer_statistics import Indices, Matrix, Vector
from m2d.choose.neurons import check_width, contribution, neuron_layer_plan, top_neurons
from m2d.choose.plan import Plan
from m2d.errors import UserError

CHOICES = ("contribution", "greedy")


@dataclass(frozen=True, eq=False)
class NeuronStatistics:
    """Sums over the calibration tokens t of one layer."""

    layer: int
    """The layer's index in the model."""
    n_tokens: int
    weighted_square_sum: Matrix
    """[E, I]: sum_t (w_te h_tej)^2."""
    down_square_norm: Matrix
    """[E, I]: ||d_ej||^2."""
    mean_weight: Vector
    """[E]: mean_t w_te, the routing weight, 0 where not selected."""
    greedy: Indices | None = None
    """[n, 2]: expert and column, in the order of `greedy_neurons`; None if it was not asked for."""
    greedy_gain: Vector | None = None
    """[n]: by how much each lowers the squared error, as a share of sum_t ||y_t||^2."""

    def neurons(self, width: int, choice: str) -> Indices:
        """The `width` neurons [width, 2] to keep. Raises UserError where there are not so many."""
        if choice == "contribution":
            score = contribution(self.weighted_square_sum, self.down_square_norm, self.n_tokens)
            return top_neurons(score, width)
        if choice != "greedy":
            raise UserError(f"unknown choice of neurons {choice!r}; known: {', '.join(CHOICES)}")
        if self.greedy is None or len(self.greedy) < width:
            given = 0 if self.greedy is None else len(self.greedy)
            raise UserError(
                f"the statistics have {given} neurons in greedy order, not {width}; run m2d "
                f"neurons with --choice greedy --width {width}"
            )
        check_width(width, len(self.greedy))
        return self.greedy[:width]


def neuron_plan(layers: list[NeuronStatistics], width: int, choice: str = "contribution") -> Plan:
    """The plan that keeps `width` single neurons in every layer.

    Each expert's down projection is scaled by its mean routing weight, until a refit replaces it.
    Raises UserError for an unknown choice, or a width that the statistics cannot give.
    """
    return Plan(
        scoring=f"neuron_{choice}",
        grouping="neurons",
        scaling="mean_weight",
        keep=None,
        layers=tuple(
            neuron_layer_plan(layer.layer, layer.neurons(width, choice), layer.mean_weight)
            for layer in layers
        ),
    )
