"""Scales against values worked out by hand, and least squares against numpy's."""

import numpy as np
import pytest
from choose_layers import hand_layer, simulate

from m2d.choose import scaling
from m2d.choose.grouping import merge_weights
from m2d.choose.scaling import SCALINGS

pytestmark = pytest.mark.filterwarnings("error")
GROUPS = [[0, 3], [1], [2]]


def test_uniform_by_hand():
    # Not renormalised: the 10 tokens carry a weight of 0.6 on average.
    layer = hand_layer(4, 3, weight_sum=[3.0, 1.0, 1.5, 0.5])
    np.testing.assert_allclose(scaling.uniform(GROUPS, np.ones(4), layer), [0.2, 0.2, 0.2])


def test_uniform_is_one_over_k_when_weights_are_renormalised():
    layer, _, _ = simulate(top_k=3)
    np.testing.assert_allclose(scaling.uniform(GROUPS, np.ones(12), layer), [1 / 3] * 3)


def test_proportional_by_hand():
    layer = hand_layer(4, 3, weight_sum=[3.0, 1.0, 1.5, 0.5])
    importance = np.array([1.0, 4.0, 2.0, 3.0])
    np.testing.assert_allclose(
        scaling.proportional(GROUPS, importance, layer), [0.24, 0.24, 0.12], rtol=1e-14
    )
    by_mean = scaling.proportional(GROUPS, importance, layer, group_importance="mean")
    np.testing.assert_allclose(by_mean, [0.15, 0.3, 0.15], rtol=1e-14)
    # One group without importance adds nothing; none with any: uniform.
    one = scaling.proportional(GROUPS, np.array([0.0, 1.0, 1.0, 0.0]), layer)
    np.testing.assert_allclose(one, [0.0, 0.3, 0.3])
    np.testing.assert_allclose(scaling.proportional(GROUPS, np.zeros(4), layer), [0.2] * 3)
    tiny = scaling.proportional(GROUPS, importance * 1e-310, layer)
    np.testing.assert_allclose(tiny, [0.24, 0.24, 0.12], rtol=1e-6)


def test_conditional_mean_by_hand():
    """The mean of CP over the kept experts, each counted once; expert 4 is not kept."""
    layer = hand_layer(
        5, 3, n_selected=[4, 5, 0, 10, 8], prob_sum_selected=[2.0, 1.0, 0.0, 3.0, 8.0]
    )
    scales = scaling.conditional_mean(GROUPS, np.ones(5), layer)
    np.testing.assert_allclose(scales, [(0.5 + 0.2 + 0.3) / 3] * 3)
    over_all = scaling.conditional_mean(GROUPS, np.ones(5), layer, over="all")
    np.testing.assert_allclose(over_all, [(0.5 + 0.2 + 0.3 + 1.0) / 4] * 3)
    never = hand_layer(5, 3, n_selected=np.zeros(5))
    np.testing.assert_allclose(
        scaling.conditional_mean(GROUPS, np.ones(5), never),
        scaling.uniform(GROUPS, np.ones(5), never),
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_every_scaling_gives_a_finite_number_per_group(name):
    for seed in range(3):
        layer, _, _ = simulate(top_k=3, seed=seed)
        importance = np.random.default_rng(seed).random(12)
        scales = SCALINGS[name](GROUPS, importance, layer)
        assert scales.shape == (3,)
        assert np.isfinite(scales).all()
        assert scales.any()


def test_both_keep_the_total_weight():
    layer, _, _ = simulate(top_k=3)
    importance = np.random.default_rng(0).random(12)
    for name in SCALINGS.paper:
        assert SCALINGS[name](GROUPS, importance, layer).sum() == pytest.approx(1.0)


def test_least_squares_matches_numpy_for_single_experts():
    layer, output, target = simulate(experts=8, tokens=50, hidden=3, seed=1)
    groups = [[1], [4], [6]]
    columns = output[:, [1, 4, 6]].transpose(0, 2, 1).reshape(-1, 3)
    expected = np.linalg.lstsq(columns, target.reshape(-1))[0]
    exact = scaling.least_squares(groups, np.ones(8), layer, ridge=0.0)
    np.testing.assert_allclose(exact, expected, rtol=1e-9)
    np.testing.assert_allclose(
        scaling.least_squares(groups, np.ones(8), layer), expected, rtol=1e-4
    )


def test_least_squares_takes_a_merged_group_as_its_members_average():
    layer, output, target = simulate(experts=8, tokens=50, hidden=3, seed=2)
    importance = np.random.default_rng(0).random(8)
    groups = [[0, 3, 5], [1], [2, 7]]
    average = np.stack(
        [np.einsum("e,teh->th", merge_weights(g, importance), output[:, g]) for g in groups], axis=1
    )
    columns = average.transpose(0, 2, 1).reshape(-1, 3)
    expected = np.linalg.lstsq(columns, target.reshape(-1))[0]
    found = scaling.least_squares(groups, importance, layer, ridge=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_least_squares_by_hand():
    layer = hand_layer(2, 2, gram=[[4.0, 0.0], [0.0, 1.0]], output_dot=[2.0, -1.0])
    found = scaling.least_squares([[0], [1]], np.ones(2), layer)
    np.testing.assert_allclose(found, [0.5, -1.0], rtol=1e-5)
    # eps = 0.4 * mean(4, 1) = 1
    ridged = scaling.least_squares([[0], [1]], np.ones(2), layer, ridge=0.4)
    np.testing.assert_allclose(ridged, [2 / 5, -1 / 2])


def test_least_squares_of_copies_and_of_nothing():
    # Two copies share what one would take, though rounding has made the matrix indefinite.
    gram = [[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]]
    copies = hand_layer(2, 2, gram=gram, output_dot=[1.0, 1.0 + 1e-9])
    found = scaling.least_squares([[0], [1]], np.ones(2), copies)
    np.testing.assert_allclose(found, [0.5, 0.5], rtol=2e-3)
    nothing = hand_layer(2, 2, gram=np.zeros((2, 2)), output_dot=[0, 0], weight_sum=[5, 5])
    assert scaling.least_squares([[0], [1]], np.ones(2), nothing).tolist() == [0.5, 0.5]
