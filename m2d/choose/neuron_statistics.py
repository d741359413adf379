"""What choosing neurons works from: the statistics of one MoE layer, as float64 arrays.

Shapes: E routed experts, I an expert's intermediate size, n neurons in an order of choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from m2d.choose.layer_statistics import Indices, Matrix, Vector
from m2d.choose.neurons import check_width, neuron_layer_plan, routed_contribution, top_neurons
from m2d.choose.plan import Plan
from m2d.errors import UserError
from m2d.methods import Table

Choice = Callable[["NeuronStatistics", int], Indices]
CHOICES: Table[Choice] = Table("neurons", default="contribution")


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
    shared_weight: float = 1.0
    """The mean weight of a shared expert that has a gate."""


@CHOICES.method(
    "contribution", "those that contribute most to the routed output, each by itself", paper=False
)
def contribution(layer: NeuronStatistics, width: int) -> Indices:
    """The highest routed contribution, mean_t (w_te h_tej)^2 ||d_ej||^2, each neuron by itself."""
    score = routed_contribution(layer.weighted_square_sum, layer.down_square_norm, layer.n_tokens)
    return top_neurons(score, width)


@CHOICES.method(
    "greedy", "one by one, each that a refitted down projection gains most from", paper=False
)
def greedy(layer: NeuronStatistics, width: int) -> Indices:
    """One by one, each that a refitted down projection gains most from; see `greedy_neurons`."""
    if layer.greedy is None or len(layer.greedy) < width:
        given = 0 if layer.greedy is None else len(layer.greedy)
        raise UserError(
            f"the statistics have {given} neurons in greedy order, not {width}; run m2d "
            f"neurons with --choice greedy --width {width}"
        )
    check_width(width, len(layer.greedy))
    return layer.greedy[:width]


def neuron_plan(layers: list[NeuronStatistics], width: int, choice: str = "contribution") -> Plan:
    """The plan that keeps `width` single neurons in every layer, chosen by a method of CHOICES.

    Each expert's down projection is scaled by its mean routing weight, until a refit replaces it.
    Raises UserError for an unknown choice, or a width that the statistics cannot give.
    """
    choice = CHOICES.resolve(choice)
    return Plan(
        scoring=f"neuron_{choice}",
        grouping="neurons",
        scaling="mean_weight",
        keep=None,
        layers=tuple(
            replace(
                neuron_layer_plan(layer.layer, CHOICES[choice](layer, width), layer.mean_weight),
                shared_scale=layer.shared_weight,
            )
            for layer in layers
        ),
    )
