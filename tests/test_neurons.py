"""Choosing single neurons, against values worked out by hand and explicit least squares."""

import numpy as np
import pytest

from m2d.choose.greedy import greedy_regression
from m2d.choose.neurons import (
    allot_widths,
    greedy_neurons,
    neuron_layer_plan,
    routed_contribution,
    top_neurons,
)
from m2d.choose.plan import Plan, plan_from_dict
from m2d.errors import UserError


def test_contribution_by_hand():
    score = routed_contribution(
        np.array([[8.0, 2.0], [0.0, 4.0]]), np.array([[1.0, 3.0], [9.0, 2.0]]), 4
    )
    assert score.tolist() == [[2.0, 1.5], [0.0, 2.0]]
    assert top_neurons(score, 3).tolist() == [[0, 0], [1, 1], [0, 1]]  # a tie: the lower expert
    assert top_neurons(score, 4).tolist()[-1] == [1, 0]


def explicit_regression(columns, target, count, penalty=0.0):
    """Forward selection by its definition: a fresh least-squares solution per candidate."""
    picked: list[int] = []
    errors = [(target**2).sum()]
    for _ in range(count):
        trials = {}
        for candidate in range(columns.shape[1]):
            if candidate in picked:
                continue
            chosen = columns[:, [*picked, candidate]]
            root = np.sqrt(penalty) * np.eye(chosen.shape[1])
            left = np.vstack([chosen, root])
            right = np.vstack([target, np.zeros((len(root), target.shape[1]))])
            solution = np.linalg.lstsq(left, right)[0]
            trials[candidate] = ((right - left @ solution) ** 2).sum()
        picked.append(min(trials, key=trials.__getitem__))
        errors.append(trials[picked[-1]])
    return picked, -np.diff(errors)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_greedy_matches_explicit_least_squares(seed, ridge):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(9, 12))  # 12 columns of rank 9
    columns = rng.normal(size=(50, 9)) @ mixing + 0.1 * rng.normal(size=(50, 12))
    target = rng.normal(size=(50, 3)) + columns[:, :3]
    gram, cross = columns.T @ columns, columns.T @ target
    penalty = ridge * np.diag(gram).mean()
    picked, expected = explicit_regression(columns, target, 12, penalty)
    candidates = np.stack([np.arange(12) // 4, np.arange(12) % 4], axis=1)
    neurons, gains = greedy_neurons(candidates, gram, cross, 12, ridge=ridge)
    assert neurons.tolist() == candidates[picked].tolist()
    np.testing.assert_allclose(gains, expected, rtol=1e-6, atol=1e-9)
    # Nested: a narrower choice is a prefix.
    narrow, narrow_gains = greedy_neurons(candidates, gram, cross, 5, ridge=ridge)
    assert narrow.tolist() == neurons[:5].tolist()
    np.testing.assert_allclose(narrow_gains, gains[:5])


def test_greedy_passes_over_what_others_already_say():
    # Columns 0 and 1 are the same; by their own strength they would come first and second.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 3)))[0]
    columns = basis[:, [0, 0, 1, 2]]
    target = basis @ np.diag([3.0, 2.0, 1.0])
    candidates = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    neurons, gains = greedy_neurons(candidates, columns.T @ columns, columns.T @ target, 4, 1e-4)
    assert neurons.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    np.testing.assert_allclose(gains, [9, 4, 1, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_rank_exhausted_is_seen_through_rounding(seed):
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 10))
    target = rng.normal(size=(50, 2))
    gram, cross = columns.T @ columns, columns.T @ target
    order, gains = greedy_regression(gram, cross, 10, 0.0, np.arange(10.0))
    # Whichever comes fourth spans what is left: all are equal then, up to rounding.
    assert order.tolist()[:3] == explicit_regression(columns, target, 3)[0]
    assert order.tolist()[4:] == sorted(set(range(10)) - set(order.tolist()[:4]), reverse=True)
    assert gains[4:].tolist() == [0.0] * 6


def test_greedy_with_nothing_to_gain_falls_back():
    fallback = np.array([0.0, 2.0, 1.0, 2.0])
    for gram, cross in ((np.eye(4), np.zeros((4, 2))), (np.zeros((4, 4)), np.zeros((4, 2)))):
        order, gains = greedy_regression(gram, cross, 3, 0.1, fallback)
        assert order.tolist() == [1, 3, 2]
        assert gains.tolist() == [0, 0, 0]


@pytest.mark.parametrize("width", [0, -1, 5])
def test_width_outside_its_bounds_is_refused(width):
    message = f"width is {width}; it must lie between 1 and 4"
    with pytest.raises(UserError, match=message):
        top_neurons(np.ones((2, 2)), width)
    with pytest.raises(UserError, match=message):
        greedy_neurons(np.zeros((4, 2), int), np.eye(4), np.ones((4, 1)), width)


def test_plan_of_neurons():
    neurons = np.array([[3, 7], [0, 2], [3, 1], [3, 0]])
    layer = neuron_layer_plan(5, neurons, np.array([0.1, 0.2, 0.3, 0.4]))
    plan = Plan("neurons", "neurons", "uniform", None, (layer,))
    assert plan.to_dict()["layers"] == [
        {
            "layer": 5,
            "groups": [
                {"experts": [0], "weights": [1.0], "scale": 0.1, "neurons": [2]},
                {"experts": [3], "weights": [1.0], "scale": 0.4, "neurons": [0, 1, 7]},
            ],
        }
    ]
    assert layer.width(8) == 4
    assert plan_from_dict(plan.to_dict(), num_experts=4, expert_width=8) == plan
    shuffled = neuron_layer_plan(5, neurons[::-1], np.array([0.1, 0.2, 0.3, 0.4]))
    assert shuffled == layer


def test_widths_go_where_the_error_falls_most():
    gains = [np.array([5.0, 1.0, 0.5, 0.1]), np.array([4.0, 3.0, 2.0, 0.2])]
    assert allot_widths(gains, 2) == [1, 1]
    assert allot_widths(gains, 4) == [1, 3]
    assert allot_widths(gains, 5) == [2, 3]
    assert allot_widths(gains, 99) == [4, 4]
    assert allot_widths(gains, 6, multiple=2) == [2, 4]  # in blocks: 0.6 against 2.2
    assert allot_widths(gains, 7, multiple=2) == [2, 4]
    assert allot_widths(gains, 6, minimum=3, multiple=1) == [3, 3]
    assert allot_widths(gains, 8, minimum=3, multiple=2) == [4, 4]


def test_widths_that_do_not_fit_are_refused():
    gains = [np.ones(4), np.ones(4)]
    with pytest.raises(UserError, match="a total width of 5 is too small for 2 layers of at least"):
        allot_widths(gains, 5, minimum=3)
    with pytest.raises(UserError, match="fewer than 6 neurons"):
        allot_widths(gains, 99, minimum=5, multiple=2)
