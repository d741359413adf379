"""Grouping methods: deal the K kept experts of a layer into k groups, each merged into one.

A method is one function (kept, importance, layer, num_groups) -> groups, entered in GROUPINGS where
it is written; a card says "Merged: into k groups by ..." and then its words.
  kept        [K] expert ids, best first (a prefix of a ranking's order)
  importance  [E] by expert id
  layer       the layer's statistics
  num_groups  k; 1 <= k <= K
Every method returns exactly k non-empty groups that together hold each kept expert once, in one
form (experts ascending, groups by their first expert), so that equal groupings compare equal.
K == k gives each expert its own group, whatever the method.
Source: arXiv:2605.28207; the readings of our own are named arguments, listed in docs/method.md.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from m2d.choose.layer_statistics import Indices, LayerStatistics, Matrix, Vector
from m2d.methods import Table

Groups = list[list[int]]
Linkage = Literal["average", "complete", "single"]
Metric = Literal["euclidean", "cosine"]

GROUPINGS: Table[Callable[..., Groups]] = Table("grouping", default="round_robin")


@GROUPINGS.method("RR", "dealt to the groups in turn, in order of importance")
def round_robin(
    kept: Indices,
    importance: Vector,
    layer: LayerStatistics,
    num_groups: int,
    by: Literal["importance", "order"] = "importance",
) -> Groups:
    """RR: in order of importance, dealt to the groups in turn (k+1-th to the first group again).

    Equal importance: as ranked. `by="order"` deals in the ranking's order, which differs from that
    of importance for the methods that weigh redundancy too.
    """
    if by == "importance":
        kept = kept[np.argsort(-importance[kept], kind="stable")]
    return canonical([kept[start::num_groups].tolist() for start in range(num_groups)])


@GROUPINGS.method("WC", "clustered by the distances between their weights")
def weight_cluster(
    kept: Indices,
    importance: Vector,
    layer: LayerStatistics,
    num_groups: int,
    metric: Metric = "euclidean",
    method: Linkage = "average",
) -> Groups:
    """WC: clusters of the experts' own weights, distances from W."""
    return cluster(kept, layer.gram.weight_gram, num_groups, metric, method)


@GROUPINGS.method("RC", "clustered by the distances between their router rows")
def router_cluster(
    kept: Indices,
    importance: Vector,
    layer: LayerStatistics,
    num_groups: int,
    metric: Metric = "euclidean",
    method: Linkage = "average",
) -> Groups:
    """RC: clusters of the router's rows, distances from R."""
    return cluster(kept, layer.gram.router_gram, num_groups, metric, method)


@GROUPINGS.method("AB", "joined to the most similar of the leading experts")
def dominant_expert(
    kept: Indices,
    importance: Vector,
    layer: LayerStatistics,
    num_groups: int,
    similarity: Literal["router", "output", "weight"] = "router",
) -> Groups:
    """AB: the first k of the ranking are anchors; every other joins its most similar anchor.

    Similarity: the cosine of router rows, or of outputs or weights. Equal cosines: the anchor
    ranked first.
    """
    matrices = {
        "router": layer.gram.router_gram,
        "output": layer.gram.gram,
        "weight": layer.gram.weight_gram,
    }
    cosine = cosines(matrices[similarity])
    anchors, others = kept[:num_groups], kept[num_groups:]
    groups = [[int(anchor)] for anchor in anchors]
    # Rounded, so that an exact tie is a tie whatever the order of summation was.
    nearest = np.round(cosine[np.ix_(others, anchors)], 12).argmax(axis=1)
    for expert, group in zip(others, nearest, strict=True):
        groups[group].append(int(expert))
    return canonical(groups)


@GROUPINGS.method("OC", "clustered by the distances between their outputs")
def output_cluster(
    kept: Indices,
    importance: Vector,
    layer: LayerStatistics,
    num_groups: int,
    metric: Metric = "euclidean",
    method: Linkage = "average",
) -> Groups:
    """OC: clusters of the experts' outputs on the calibration tokens, distances from G."""
    return cluster(kept, layer.gram.gram, num_groups, metric, method)


def merge_weights(group: list[int], importance: Vector) -> list[float]:
    """Weights with which a group's experts are averaged: importance normalised to 1 in the group.

    Equal weights where every importance is 0.
    """
    share = importance[group]
    total = float(share.sum())
    if total <= 0.0:
        return [1.0 / len(group)] * len(group)
    return (share / total).tolist()


def cluster(
    kept: Indices,
    gram: Matrix,
    num_groups: int,
    metric: Metric = "euclidean",
    method: Linkage = "average",
) -> Groups:
    """Agglomerative clustering of the kept experts into exactly `num_groups`.

    gram: [E, E] inner products that give the distances. The order of `kept` does not matter.
    """
    # Here, so that listing the methods does not take scipy's half second.
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    experts = np.sort(kept)
    groups = {index: [int(expert)] for index, expert in enumerate(experts)}
    merges = len(experts) - num_groups
    if merges > 0:
        inner = gram[np.ix_(experts, experts)]
        distance = distances(inner) if metric == "euclidean" else 1.0 - cosines(inner)
        np.fill_diagonal(distance, 0.0)
        # Rounded, in units of the largest: see dominant_expert.
        largest = float(distance.max())
        condensed = squareform(np.round(distance / (largest or 1.0), 12), checks=False)
        # The first K - k merges, replayed: fcluster may stop short of k clusters where distances
        # tie, and cut_tree orders tied merges as it likes.
        for step, row in enumerate(linkage(condensed, method)[:merges]):
            groups[len(experts) + step] = groups.pop(int(row[0])) + groups.pop(int(row[1]))
    return canonical(list(groups.values()))


def distances(gram: Matrix) -> Matrix:
    """Euclidean distances [E, E] from inner products: sqrt(g_ii + g_jj - 2 g_ij)."""
    squared = np.diagonal(gram)
    return np.sqrt(np.maximum(squared[:, None] + squared[None, :] - gram - gram.T, 0.0))


def cosines(gram: Matrix) -> Matrix:
    """Cosines [E, E] from inner products; 0 for a zero vector."""
    norm = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    scale = np.outer(norm, norm)
    return np.divide(gram, scale, out=np.zeros_like(scale), where=scale > 0)


def canonical(groups: Groups) -> Groups:
    """The same groups with experts ascending and groups by their first expert."""
    return sorted(sorted(group) for group in groups)
