"""Scoring methods: each ranks the routed experts of one layer from its statistics alone.

Shapes: E routed experts, K picked ones, k the router's top-k. A method is one function from
LayerStatistics to Ranking, entered in SCORINGS where it is written; a card says "Kept: K experts,
chosen by ..." and then its words. Ties go to the lower expert id.
Source: "Pruning and Distilling Mixture-of-Experts into Dense Language Models" (arXiv:2605.28207);
where it leaves room, the reading is a named argument, and docs/method.md lists them.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from m2d.choose.greedy import greedy_log_determinant, greedy_regression
from m2d.choose.layer_statistics import Indices, LayerStatistics, Vector
from m2d.choose.ranking import Ranking, by_importance
from m2d.errors import UserError
from m2d.methods import Table

NormOver = Literal["all_tokens", "selected_tokens", "mean"]
"""Size of an expert's output: its root mean square norm over all tokens, or over those that
selected it; or the mean of its norm over all tokens."""
SCORINGS: Table[Callable[..., Ranking]] = Table("scoring", default="gld_reap")


@SCORINGS.method("SF", "how often the router selects them")
def selection_freq(layer: LayerStatistics) -> Ranking:
    """SF: the share of tokens that select the expert, n_selected / n_tokens."""
    return by_importance(layer.routing.n_selected / layer.routing.n_tokens)


@SCORINGS.method("PP", "their mean router probability before top-k")
def preselect_prob(layer: LayerStatistics) -> Ranking:
    """PP: the mean router probability before top-k, prob_sum / n_tokens."""
    return by_importance(layer.routing.prob_sum / layer.routing.n_tokens)


@SCORINGS.method("PS", "their mean routing weight after top-k")
def postselect_prob(
    layer: LayerStatistics, over: Literal["all_tokens", "selected_tokens"] = "all_tokens"
) -> Ranking:
    """PS: the mean routing weight after top-k, weight_sum / n_tokens.

    `over="selected_tokens"` divides by n_selected instead (0 if never selected).
    """
    routing = layer.routing
    if over == "selected_tokens":
        return by_importance(_ratio(routing.weight_sum, routing.n_selected))
    return by_importance(routing.weight_sum / routing.n_tokens)


@SCORINGS.method("CP", "their mean router probability where they are selected")
def conditional_prob(layer: LayerStatistics) -> Ranking:
    """CP: the mean router probability where selected, prob_sum_selected / n_selected, or 0."""
    return by_importance(conditional_probability(layer))


@SCORINGS.method("ACP", "their router probability where selected, times the size of their output")
def reap(layer: LayerStatistics, norm_over: NormOver = "all_tokens") -> Ranking:
    """ACP: CP times the root mean square norm of the expert's output, CP_e * sqrt(G_ee).

    The paper's code calls it `reap`; Cerebras' REAP is `cerebras_reap`. `norm_over`: see NormOver.
    """
    return by_importance(activated_probability(layer, norm_over))


@SCORINGS.method(
    "DO-CP",
    "a greedy D-optimal choice: router probability where selected, penalising experts "
    "whose outputs resemble those already chosen",
)
def gram_logdet(
    layer: LayerStatistics,
    kernel: Literal["gram", "cosine"] = "gram",
    ridge: float | None = None,
) -> Ranking:
    """DO-CP: greedy D-optimal selection with importance CP; see `d_optimal_order`."""
    importance = conditional_probability(layer)
    return Ranking(d_optimal_order(layer, importance, kernel, ridge), importance)


@SCORINGS.method(
    "DO-ACP",
    "a greedy D-optimal choice: router probability where selected times output size, "
    "penalising experts whose outputs resemble those already chosen",
)
def gld_reap(
    layer: LayerStatistics,
    norm_over: NormOver = "all_tokens",
    kernel: Literal["gram", "cosine"] = "gram",
    ridge: float | None = None,
) -> Ranking:
    """DO-ACP: greedy D-optimal selection with importance ACP; see `d_optimal_order`."""
    importance = activated_probability(layer, norm_over)
    return Ranking(d_optimal_order(layer, importance, kernel, ridge), importance)


@SCORINGS.method(
    "OMP",
    "a greedy choice of those whose outputs together best fit the routed output",
    paper=False,
)
def omp(layer: LayerStatistics, ridge: float = 1e-6) -> Ranking:
    """OMP: greedy forward selection by the reduction in ||y - sum_e a_e f_e||^2, from G, b and c.

    Every coefficient is refitted at every pick, `ridge` * mean(diag G) being added to G's diagonal
    against rounding. Not of the paper. Importance: the share of ||y||^2 that the expert explains
    alone, b_e^2 / (G_ee c).
    """
    gram, dot, total = layer.gram.gram, layer.gram.output_dot, layer.gram.output_sq_norm
    importance = _ratio(dot**2, np.diagonal(gram) * total)
    order, _ = greedy_regression(gram, dot[:, None], layer.num_experts, ridge, importance)
    return Ranking(order, importance)


@SCORINGS.method(
    "Cerebras-REAP",
    "their routing weight times the size of their output, where they are selected",
    paper=False,
)
def cerebras_reap(layer: LayerStatistics) -> Ranking:
    """Cerebras-REAP: the mean of weight times output norm where selected,
    weighted_out_norm_sum / n_selected, or 0. The paper's `reap` is ACP, another quantity.

    Source: arXiv:2510.13999.
    """
    return by_importance(routed_activation(layer))


@SCORINGS.method(
    "DO-REAP",
    "a greedy D-optimal choice: Cerebras' REAP score, penalising experts whose outputs resemble "
    "those already chosen",
    paper=False,
)
def gld_cerebras_reap(
    layer: LayerStatistics,
    kernel: Literal["gram", "cosine"] = "gram",
    ridge: float | None = None,
) -> Ranking:
    """DO-REAP: greedy D-optimal selection with Cerebras' REAP score as importance; see
    `d_optimal_order`."""
    importance = routed_activation(layer)
    return Ranking(d_optimal_order(layer, importance, kernel, ridge), importance)


@SCORINGS.method("MAN", "the mean size of their output where they are selected", paper=False)
def mean_activation_norm(layer: LayerStatistics) -> Ranking:
    """MAN: the mean output norm where selected, out_norm_sum_selected / n_selected, or 0."""
    return by_importance(_ratio(layer.routing.out_norm_sum_selected, layer.routing.n_selected))


@SCORINGS.method(
    "MSAN", "the mean squared size of their output where they are selected", paper=False
)
def mean_square_activation_norm(layer: LayerStatistics) -> Ranking:
    """MSAN: the mean squared output norm where selected, out_sq_norm_sum_selected / n_selected,
    or 0."""
    return by_importance(_ratio(layer.routing.out_sq_norm_sum_selected, layer.routing.n_selected))


def routed_activation(layer: LayerStatistics) -> Vector:
    """Cerebras' REAP score [E]: mean of w_te ||f_e(x_t)|| over the tokens that selected e, or 0."""
    return _ratio(layer.routing.weighted_out_norm_sum, layer.routing.n_selected)


def conditional_probability(layer: LayerStatistics) -> Vector:
    """CP [E]: prob_sum_selected / n_selected, 0 where never selected."""
    return _ratio(layer.routing.prob_sum_selected, layer.routing.n_selected)


def activated_probability(layer: LayerStatistics, norm_over: NormOver = "all_tokens") -> Vector:
    """ACP [E]: CP times the size of the expert's output.

    Raises UserError for `norm_over="mean"` where the Gram statistics were made before they held it.
    """
    return conditional_probability(layer) * output_size(layer, norm_over)


def output_size(layer: LayerStatistics, norm_over: NormOver) -> Vector:
    """The size [E] of each expert's output; see NormOver."""
    if norm_over == "mean":
        if layer.gram.output_norm is None:
            raise UserError("the Gram statistics have no mean output norms; run m2d gram again")
        return layer.gram.output_norm
    if norm_over == "selected_tokens":
        routing = layer.routing
        squared = _ratio(routing.out_sq_norm_sum_selected, routing.n_selected)
    else:
        squared = np.diagonal(layer.gram.gram)
    return np.sqrt(np.maximum(squared, 0.0))


def d_optimal_order(
    layer: LayerStatistics,
    importance: Vector,
    kernel: Literal["gram", "cosine"] = "gram",
    ridge: float | None = None,
) -> Indices:
    """Greedy maximisation of log det(M_SS + lambda I), M = D G D, D = diag(sqrt(importance)).

    `kernel="cosine"` replaces G by the cosines of the expert outputs. lambda = ridge * mean(diag M)
    where `ridge` defaults to 1/k. Nested: returns all E experts; the choice for any K is a prefix.
    """
    gram = layer.gram.gram
    if kernel == "cosine":
        norm = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
        gram = _ratio(gram, np.outer(norm, norm))
    root = np.sqrt(importance)
    weighted = root[:, None] * gram * root[None, :]
    mean = float(np.diagonal(weighted).mean())
    if mean <= 0.0:  # no expert was ever selected, or none puts anything out
        return by_importance(importance).order
    # In units of the mean, so that neither the weights' scale nor the data's matters.
    matrix = weighted / mean
    matrix[np.diag_indices_from(matrix)] += 1.0 / layer.top_k if ridge is None else ridge
    return greedy_log_determinant(matrix, importance)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is 0."""
    result = np.zeros(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)))
    return np.divide(numerator, denominator, out=result, where=denominator > 0)
