"""Scaling methods: the constant s_g of each group's down projection, in place of routing weights.

The student computes sum_g s_g f_g(x). A method is one function (groups, importance, layer) -> [k],
entered in SCALINGS where it is written: groups as expert ids, importance [E] by expert id, the
layer's statistics. A card says "Scaled:" and then its words.
Source: arXiv:2605.28207; the readings of our own are named arguments, listed in docs/method.md.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from m2d.choose.grouping import Groups, merge_weights
from m2d.choose.layer_statistics import LayerStatistics, Vector
from m2d.methods import Table

SCALINGS: Table[Callable[..., Vector]] = Table("scaling", default="uniform")


@SCALINGS.method(
    "uniform",
    "every group's down projection is scaled alike, by the mean routing weight",
)
def uniform(groups: Groups, importance: Vector, layer: LayerStatistics) -> Vector:
    """s_g = m / k, m the mean total routing weight (1 if top-k weights are renormalised)."""
    return np.full(len(groups), total_weight(layer) / len(groups))


@SCALINGS.method(
    "proportional",
    "each group's down projection is scaled by its share of the importance",
)
def proportional(
    groups: Groups,
    importance: Vector,
    layer: LayerStatistics,
    group_importance: Literal["sum", "mean"] = "sum",
) -> Vector:
    """s_g = m * importance(g) / sum over groups; uniform where every importance is 0.

    A group's importance is the sum of its experts', or their mean.
    """
    reduce = np.sum if group_importance == "sum" else np.mean
    share = np.array([float(reduce(importance[group])) for group in groups])
    total = float(share.sum())
    if total <= 0.0:
        return uniform(groups, importance, layer)
    return total_weight(layer) * (share / total)


@SCALINGS.method(
    "least-squares",
    "each group's down projection is scaled to fit the routed output best",
    paper=False,
)
def least_squares(
    groups: Groups, importance: Vector, layer: LayerStatistics, ridge: float = 1e-6
) -> Vector:
    """The scales that minimise mean_t ||y_t - sum_g s_g f_g(x_t)||^2: (G' + eps I)^-1 b'.

    Not of the paper. G' = A G A^T and b' = A b, A [k, E] the merge weights; eps = ridge *
    mean(diag G'). Exact where every group is one expert. A merged group's output is taken as the
    average of its members' outputs, which is what their Gram can tell, though merging averages
    their weights. Scales may be negative. Uniform where no expert puts anything out.
    """
    mix = np.zeros((len(groups), layer.num_experts))
    for row, group in zip(mix, groups, strict=True):
        row[group] = merge_weights(group, importance)
    gram = mix @ layer.gram.gram @ mix.T
    mean = float(np.diagonal(gram).mean())
    if mean <= 0.0:
        return uniform(groups, importance, layer)
    # By eigenvalues, since G is stored in float32: rounding may leave it slightly indefinite.
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    inverse = 1.0 / (np.maximum(values, 0.0) + ridge * mean)
    return vectors @ (inverse * (vectors.T @ (mix @ layer.gram.output_dot)))


@SCALINGS.method(
    "conditional-mean",
    "every group's down projection is scaled alike, by the mean routing probability of the kept "
    "experts where they are selected",
    paper=False,
)
def conditional_mean(
    groups: Groups,
    importance: Vector,
    layer: LayerStatistics,
    over: Literal["kept", "all"] = "kept",
) -> Vector:
    """The mean over the kept experts of CP_e, the router's probability where it selects e.

    As the model cards of the paper's DeepSeek-V2-Lite students have it. `over="all"` takes the mean
    over all experts of the layer. Experts that were never selected count in neither.
    """
    routing = layer.routing
    experts = np.concatenate(groups) if over == "kept" else np.arange(layer.num_experts)
    experts = experts[routing.n_selected[experts] > 0]
    if not len(experts):
        return uniform(groups, importance, layer)
    conditional = routing.prob_sum_selected[experts] / routing.n_selected[experts]
    return np.full(len(groups), float(conditional.mean()))


def total_weight(layer: LayerStatistics) -> float:
    """m: the mean over tokens of the sum of routing weights."""
    return float(layer.routing.weight_sum.sum() / layer.routing.n_tokens)
