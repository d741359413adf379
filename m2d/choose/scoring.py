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
from m2d.methods import Table

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
def reap(
    layer: LayerStatistics, norm_over: Literal["all_tokens", "selected_tokens"] = "all_tokens"
) -> Ranking:
    """ACP: CP times the root mean square norm of the expert's output, CP_e * sqrt(G_ee).

    `norm_over="selected_tokens"` takes that norm over the tokens that selected the expert.
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
    norm_over: Literal["all_tokens", "selected_tokens"] = "all_tokens",
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


def conditional_probability(layer: LayerStatistics) -> Vector:
    """CP [E]: prob_sum_selected / n_selected, 0 where never selected."""
    return _ratio(layer.routing.prob_sum_selected, layer.routing.n_selected)


def activated_probability(
    layer: LayerStatistics, norm_over: Literal["all_tokens", "selected_tokens"] = "all_tokens"
) -> Vector:
    """ACP [E]: CP times the root mean square output norm."""
    if norm_over == "selected_tokens":
        squared = _ratio(layer.routing.out_sq_norm_sum_selected, layer.routing.n_selected)
    else:
        squared = np.diagonal(layer.gram.gram)
    return conditional_probability(layer) * np.sqrt(np.maximum(squared, 0.0))


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
