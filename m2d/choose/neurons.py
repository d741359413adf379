"""Single intermediate neurons, chosen across all experts of a layer, in place of whole experts.

Not of the paper. A neuron is (expert, column): the activation h_tej of expert e's j-th
intermediate column, with its row of gate and up and its column d_ej of down. The student keeps any
number of them in each layer, and a refit of the down projection follows.

Shapes: E routed experts, I an expert's intermediate size, H hidden size, N candidate neurons.
"""

from collections.abc import Sequence

import numpy as np

from m2d.choose.greedy import greedy_regression
from m2d.choose.layer_statistics import Indices, Matrix, Vector
from m2d.choose.plan import Group, LayerPlan
from m2d.errors import UserError

Neurons = Indices
"""[n, 2]: expert and column, one neuron a row."""


def routed_contribution(
    weighted_square_sum: Matrix, down_square_norm: Matrix, n_tokens: int
) -> Matrix:
    """Routed contribution [E, I] of each neuron: mean_t (w_te h_tej)^2 * ||d_ej||^2.

    weighted_square_sum [E, I]: sum_t (w_te h_tej)^2; down_square_norm [E, I]: ||d_ej||^2.
    """
    return weighted_square_sum * down_square_norm / n_tokens


def top_neurons(score: Matrix, width: int) -> Neurons:
    """The `width` neurons of the highest score [E, I], best first.

    Equal scores: the lower expert, then the lower column. Raises UserError when there are not so
    many neurons.
    """
    check_width(width, score.size)
    flat = np.argsort(-score.reshape(-1), kind="stable")[:width]
    return np.stack(np.unravel_index(flat, score.shape), axis=1).astype(np.int64)


def greedy_neurons(
    candidates: Neurons, gram: Matrix, cross: Matrix, width: int, ridge: float = 1e-2
) -> tuple[Neurons, Vector]:
    """`width` of the candidates, each the one that a refitted down projection gains most from.

    Unlike the routed contribution this accounts for correlation: a neuron that repeats others adds
    nothing. From what a refit needs, over the candidates' columns (the best by contribution, say
    four times the width; all of them where the memory for `gram` allows):
      candidates [N, 2]; gram [N, N]: H'H; cross [N, H]: H'Y; ridge times mean(diag gram): see
      `greedy_regression`
    Returns the neurons [width, 2] in order of choice, so that any prefix is the choice for a
    smaller width, and by how much each lowers the squared error [width].
    """
    check_width(width, len(candidates))
    # Those that no longer help, if any, in the order of the candidates.
    fallback = -np.arange(len(candidates), dtype=np.float64)
    picks, gains = greedy_regression(gram, cross, width, ridge, fallback)
    return candidates[picks], gains


def allot_widths(
    gains: Sequence[Vector], total: int, *, minimum: int = 1, multiple: int = 1
) -> list[int]:
    """Widths of the layers that add up to at most `total` and lower the summed error most.

    gains: per layer, by how much each further neuron lowers that layer's error, in order of choice;
    comparable between layers (say, as shares of each layer's mean squared output). Widths are
    multiples of `multiple` and at least `minimum` (rounded up to one). Each step widens the layer
    whose next block of neurons gains most, which is optimal where gains fall.
    Raises UserError when `total` is less than the least widths together.
    """
    least = -(-max(minimum, 1) // multiple) * multiple
    if least * len(gains) > total or any(len(gain) < least for gain in gains):
        raise UserError(
            f"a total width of {total} is too small for {len(gains)} layers of at least {least}"
            if least * len(gains) > total
            else f"a layer has fewer than {least} neurons to choose from"
        )
    blocks = [
        gain[: len(gain) // multiple * multiple].reshape(-1, multiple).sum(axis=1) for gain in gains
    ]
    widths = [least] * len(gains)
    while sum(widths) + multiple <= total:
        following = [
            block[width // multiple] if width // multiple < len(block) else -np.inf
            for block, width in zip(blocks, widths, strict=True)
        ]
        best = int(np.argmax(following))
        if following[best] == -np.inf:  # every neuron of every layer is taken
            break
        widths[best] += multiple
    return widths


def neuron_layer_plan(layer: int, neurons: Neurons, scales: Vector) -> LayerPlan:
    """The plan of a layer that keeps these neurons [n, 2]: one group per expert that has any.

    scales [E]: of each expert's down projection, which a refit then replaces.
    """
    groups = []
    for expert in np.unique(neurons[:, 0]):
        columns = np.sort(neurons[neurons[:, 0] == expert, 1])
        groups.append(Group((int(expert),), (1.0,), float(scales[expert]), tuple(columns.tolist())))
    return LayerPlan(layer, tuple(groups))


def check_width(width: int, available: int) -> None:
    """Raises UserError unless 1 <= width <= available."""
    if not 1 <= width <= available:
        raise UserError(
            f"width is {width}; it must lie between 1 and {available}, the neurons to choose from"
        )
