"""Groupings against layers made by hand, where what belongs together is plain to see."""

import itertools

import numpy as np
import pytest
from choose_layers import hand_layer, permuted, simulate

from m2d.choose import grouping
from m2d.choose.grouping import GROUPINGS, cluster, merge_weights

pytestmark = pytest.mark.filterwarnings("error")

# Three plain clusters on the plane: {0, 4, 5}, {1, 3}, {2}.
POINTS = np.array([[9.0, 0.1], [0.0, 8.0], [-7.0, -7.0], [0.3, 8.2], [9.1, 0.0], [9.0, 0.4]])
CLUSTERS = [[0, 4, 5], [1, 3], [2]]


def clustered(field):
    """A layer with the three clusters in one of its matrices, and others in the rest."""
    misleading = POINTS[::-1]
    grams = {
        name: (POINTS if name == field else misleading)
        for name in ("gram", "weight_gram", "router_gram")
    }
    return hand_layer(6, 3, **{name: points @ points.T for name, points in grams.items()})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("weight_cluster", "weight_gram"),
        ("router_cluster", "router_gram"),
        ("output_cluster", "gram"),
    ],
)
def test_clusters_of_the_right_matrix(name, field):
    importance = np.arange(6.0)
    assert GROUPINGS[name](np.arange(6), importance, clustered(field), 3) == CLUSTERS
    # Of a part of the experts, in any order of ranking.
    kept = np.array([5, 3, 4, 1])
    assert GROUPINGS[name](kept, importance, clustered(field), 2) == [[1, 3], [4, 5]]


def test_cosine_metric_ignores_length():
    points = np.array([[1.0, 0.0], [9.0, 0.5], [0.0, 1.0], [0.2, 8.0]])
    layer = hand_layer(4, 2, weight_gram=points @ points.T)
    kept, importance = np.arange(4), np.ones(4)
    directions = grouping.weight_cluster(kept, importance, layer, 2, metric="cosine")
    assert directions == [[0, 1], [2, 3]]
    assert grouping.weight_cluster(kept, importance, layer, 2) == [[0, 2, 3], [1]]


def test_linkage_by_hand():
    # On a line: 0, 2, 4.1, 6.3, and 10. Average: {0,2}, then 4.1-6.3 (2.2; 4.1-{0,2} is 3.1), then
    # {0,2}-{4.1,6.3} (4.2; {4.1,6.3}-10 is 4.8). Single would take 2-4.1 second; complete joins
    # {4.1,6.3} with 10 (5.9) rather than with {0,2} (6.3).
    line = np.array([[0.0], [2.0], [4.1], [6.3], [10.0]])
    gram = line @ line.T
    kept = np.arange(5)
    assert cluster(kept, gram, 3) == [[0, 1], [2, 3], [4]]
    assert cluster(kept, gram, 2) == [[0, 1, 2, 3], [4]]
    assert cluster(kept, gram, 3, method="single") == [[0, 1, 2], [3], [4]]
    assert cluster(kept, gram, 2, method="complete") == [[0, 1], [2, 3, 4]]


def slow_average_linkage(points, num_groups):
    """The definition: join the two clusters of the least mean distance until so many are left."""
    groups = [[index] for index in range(len(points))]
    while len(groups) > num_groups:
        one, other = min(
            itertools.combinations(groups, 2),
            key=lambda pair: np.mean(
                [np.linalg.norm(points[i] - points[j]) for i in pair[0] for j in pair[1]]
            ),
        )
        groups = [group for group in groups if group is not one and group is not other]
        groups.append(one + other)
    return sorted(sorted(group) for group in groups)


@pytest.mark.parametrize("num_groups", [1, 2, 5, 9])
def test_clustering_matches_the_definition(num_groups):
    points = np.random.default_rng(0).normal(size=(10, 3))
    expected = slow_average_linkage(points, num_groups)
    assert cluster(np.arange(10), points @ points.T, num_groups) == expected


def test_round_robin_by_hand():
    importance = np.array([0.1, 0.9, 0.5, 0.7, 0.3, 0.8, 0.0])
    kept = np.array([3, 1, 0, 2, 5])  # by importance: 1, 5, 3, 2, 0
    layer = hand_layer(7, 2)
    assert grouping.round_robin(kept, importance, layer, 2) == [[0, 1, 3], [2, 5]]
    # As ranked: 3, 1, 0, 2, 5.
    assert grouping.round_robin(kept, importance, layer, 2, by="order") == [[0, 3, 5], [1, 2]]
    # All alike: as ranked.
    assert grouping.round_robin(kept, np.ones(7), layer, 2) == [[0, 3, 5], [1, 2]]


def test_dominant_expert_by_hand():
    # Router rows; the anchors are the first two ranked, 4 (along x) and 1 (along y).
    rows = np.array([[0.1, 0.2], [0.0, 3.0], [5.0, 4.0], [0.3, 0.2], [1.0, 0.0], [-1.0, -0.9]])
    layer = hand_layer(6, 2, router_gram=rows @ rows.T)
    kept = np.array([4, 1, 0, 2, 3, 5])
    groups = grouping.dominant_expert(kept, np.ones(6), layer, 2)
    assert groups == [[0, 1, 5], [2, 3, 4]]  # by angle, not by length or distance
    # The same rows as outputs or weights: only if asked.
    for field, similarity in (("gram", "output"), ("weight_gram", "weight")):
        other = hand_layer(6, 2, **{field: rows @ rows.T})
        assert grouping.dominant_expert(kept, np.ones(6), other, 2, similarity) == groups
        # Identity router rows: all cosines tie at 0, and the anchor ranked first takes all.
        alone = grouping.dominant_expert(kept, np.ones(6), other, 2)
        assert alone == [[0, 2, 3, 4, 5], [1]]


def test_ties_up_to_rounding_are_ties():
    # Expert 2 is as near to anchor 0 as to anchor 1, if the last bits are not believed.
    for noise in (-1e-15, 1e-15):
        router = np.array([[1, 0, 0.5], [0, 1, 0.5 + noise], [0.5, 0.5 + noise, 1]])
        layer = hand_layer(3, 2, router_gram=router)
        groups = grouping.dominant_expert(np.arange(3), np.ones(3), layer, 2)
        assert groups == [[0, 2], [1]]
        # As distances: 0-2 and 1-2 tie, and the lower ids join.
        assert cluster(np.arange(3), router, 2) == [[0, 2], [1]]


def test_equal_importance_is_dealt_as_ranked():
    kept = np.random.default_rng(0).permutation(300)
    importance = np.random.default_rng(1).integers(0, 3, 300).astype(float)
    dealt = sorted(kept.tolist(), key=lambda expert: -importance[expert])
    groups = grouping.round_robin(kept, importance, hand_layer(300, 4), 4)
    assert groups == sorted(sorted(dealt[start::4]) for start in range(4))


def test_importance_does_not_move_anchors():
    layer, _, _ = simulate(experts=10, top_k=3)
    kept = np.array([7, 2, 9, 1, 0])
    plain = grouping.dominant_expert(kept, np.arange(10.0), layer, 3)
    assert plain == grouping.dominant_expert(kept, np.arange(10.0)[::-1], layer, 3)
    assert [len({7, 2, 9} & set(group)) for group in plain] == [1, 1, 1]


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("keep", [3, 4, 7, 12])
def test_groups_share_out_the_kept_experts(name, keep):
    for seed in range(5):
        layer, _, _ = simulate(experts=12, top_k=3, seed=seed)
        kept = np.random.default_rng(seed).permutation(12)[:keep]
        importance = np.random.default_rng(seed).random(12)
        groups = GROUPINGS[name](kept, importance, layer, 3)
        assert len(groups) == 3
        assert all(groups)
        assert sorted(itertools.chain(*groups)) == sorted(kept.tolist())
        assert groups == sorted(sorted(group) for group in groups)
        assert all(type(expert) is int for group in groups for expert in group)
        if keep == 3:
            assert groups == [[expert] for expert in sorted(kept.tolist())]


@pytest.mark.parametrize("name", ["weight_cluster", "router_cluster", "output_cluster"])
@pytest.mark.parametrize("matrix", [np.eye(8), np.ones((8, 8)), np.zeros((8, 8))])
def test_ties_still_give_exactly_k_groups(name, matrix):
    layer = hand_layer(8, 3, gram=matrix, weight_gram=matrix, router_gram=matrix)
    for keep in range(3, 9):
        groups = GROUPINGS[name](np.arange(8)[::-1][:keep], np.ones(8), layer, 3)
        assert len(groups) == 3
        assert sorted(itertools.chain(*groups)) == list(range(8 - keep, 8))
        assert groups == GROUPINGS[name](np.arange(8)[8 - keep :], np.ones(8), layer, 3)


@pytest.mark.parametrize("name", GROUPINGS)
def test_grouping_follows_renumbered_experts(name):
    layer, _, _ = simulate(experts=14, top_k=4, seed=3)
    rng = np.random.default_rng(1)
    order = rng.permutation(14)
    importance, kept = rng.random(14), rng.permutation(14)[:9]
    number = np.argsort(order)  # old id -> new id
    plain = GROUPINGS[name](kept, importance, layer, 4)
    moved = GROUPINGS[name](number[kept], importance[order], permuted(layer, order), 4)
    assert sorted(sorted(int(order[expert]) for expert in group) for group in moved) == plain


def test_merge_weights_by_hand():
    importance = np.array([3.0, 0.0, 1.0, 0.0, 1e-320, 3e-320])
    assert merge_weights([0, 2], importance) == [0.75, 0.25]
    assert merge_weights([0, 1], importance) == [1.0, 0.0]
    assert merge_weights([1, 3], importance) == [0.5, 0.5]
    assert merge_weights([2], importance) == [1.0]
    np.testing.assert_allclose(merge_weights([4, 5], importance), [0.25, 0.75], rtol=1e-3)
