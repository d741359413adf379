"""Scores against values worked out by hand; selections against slow explicit references."""

import json
from dataclasses import replace

import numpy as np
import pytest
from choose_layers import hand_layer, permuted, simulate

from m2d.choose import scoring
from m2d.choose.greedy import first_maximum, greedy_log_determinant
from m2d.choose.ranking import Ranking, rankings_from_dict, rankings_to_dict, round_significant
from m2d.choose.scoring import SCORINGS
from m2d.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")


def by_hand():
    """3 experts, top-1 of 10 tokens; the last one is never selected."""
    return hand_layer(
        3,
        1,
        n_selected=[4, 6, 0],
        prob_sum=[3.5, 4.0, 2.5],
        prob_sum_selected=[3.0, 3.0, 0.0],
        weight_sum=[4.0, 5.0, 0.0],
        out_norm_sum_selected=[4.0, 9.0, 0.0],
        weighted_out_norm_sum=[4.0, 7.5, 0.0],
        out_sq_norm_sum_selected=[4.0, 24.0, 0.0],
        output_norm=[1.5, 2.0, 7.0],
        gram=[[4.0, 1.0, 0.0], [1.0, 9.0, 0.0], [0.0, 0.0, 100.0]],
    )


@pytest.mark.parametrize(
    ("name", "importance", "order"),
    [
        ("selection_freq", [0.4, 0.6, 0.0], [1, 0, 2]),
        ("preselect_prob", [0.35, 0.4, 0.25], [1, 0, 2]),
        ("postselect_prob", [0.4, 0.5, 0.0], [1, 0, 2]),
        ("conditional_prob", [0.75, 0.5, 0.0], [0, 1, 2]),
        ("reap", [0.75 * 2, 0.5 * 3, 0.0], [0, 1, 2]),  # a tie: the lower id first
        ("cerebras_reap", [1.0, 1.25, 0.0], [1, 0, 2]),
        ("mean_activation_norm", [1.0, 1.5, 0.0], [1, 0, 2]),
        ("mean_square_activation_norm", [1.0, 4.0, 0.0], [1, 0, 2]),
    ],
)
def test_score_by_hand(name, importance, order):
    ranking = SCORINGS[name](by_hand())
    np.testing.assert_allclose(ranking.importance, importance, rtol=1e-15)
    assert ranking.order.tolist() == order


def test_other_readings_by_hand():
    layer = by_hand()
    over_selected = scoring.postselect_prob(layer, over="selected_tokens")
    np.testing.assert_allclose(over_selected.importance, [1.0, 5 / 6, 0.0])
    norm_selected = scoring.reap(layer, norm_over="selected_tokens")
    np.testing.assert_allclose(norm_selected.importance, [0.75 * 1, 0.5 * 2, 0.0])
    assert norm_selected.order.tolist() == [1, 0, 2]
    mean_norm = scoring.reap(layer, norm_over="mean")
    np.testing.assert_allclose(mean_norm.importance, [0.75 * 1.5, 0.5 * 2, 0.0])
    np.testing.assert_allclose(
        scoring.gld_reap(layer, norm_over="mean").importance, mean_norm.importance
    )
    older = replace(layer, gram=replace(layer.gram, output_norm=None))
    with pytest.raises(UserError, match="run m2d gram again"):
        scoring.reap(older, norm_over="mean")


def test_d_optimal_by_hand():
    # Experts 0 and 1 put out the same; 2 is weaker and apart. CP is 1 everywhere, so M = G.
    layer = hand_layer(3, 2, gram=[[4, 4, 0], [4, 4, 0], [0, 0, 1]])
    assert scoring.reap(layer).order.tolist() == [0, 1, 2]
    # lambda = mean(4, 4, 1) / 2 = 1.5: after 0 is picked, 1 adds 5.5 - 16/5.5 = 2.59, 2 adds 2.5.
    assert scoring.gram_logdet(layer).order.tolist() == [0, 1, 2]
    # With lambda = 0.3 * 3 = 0.9: 1 adds 4.9 - 16/4.9 = 1.63, 2 adds 1.9.
    assert scoring.gram_logdet(layer, ridge=0.3).order.tolist() == [0, 2, 1]
    # ACP = [2, 2, 1] enters M twice as sqrt: M = [[8, 8, 0], [8, 8, 0], [0, 0, 1]], lambda = 17/6:
    # 1 adds 10.83 - 64/10.83 = 4.92, 2 adds 3.83.
    np.testing.assert_allclose(scoring.gld_reap(layer).importance, [2, 2, 1])
    assert scoring.gld_reap(layer).order.tolist() == [0, 1, 2]
    # Cosines: M = [[2, 2, 0], [2, 2, 0], [0, 0, 1]], lambda 5/6: 1 adds 1.42, 2 adds 1.83.
    assert scoring.gld_reap(layer, kernel="cosine").order.tolist() == [0, 2, 1]


def explicit_d_optimal(layer, importance, ridge=None, kernel="gram", keep=None):
    """The definition, word for word: a fresh determinant per candidate."""
    gram = layer.gram.gram
    if kernel == "cosine":
        norm = np.sqrt(np.diag(gram))
        gram = gram / np.outer(norm, norm)
    matrix = np.diag(np.sqrt(importance)) @ gram @ np.diag(np.sqrt(importance))
    matrix = matrix + np.eye(len(gram)) * np.diag(matrix).mean() * (
        1 / layer.top_k if ridge is None else ridge
    )
    picked: list[int] = []
    for _ in range(keep or len(gram)):
        rest = [expert for expert in range(len(gram)) if expert not in picked]
        values = [
            np.linalg.slogdet(matrix[np.ix_([*picked, expert], [*picked, expert])])[1]
            for expert in rest
        ]
        picked.append(rest[int(np.argmax(values))])
    return picked


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("hidden", [1, 4, 64])
def test_d_optimal_matches_explicit_determinants(seed, hidden):
    # One or two tokens' worth of outputs leave the Gram matrix far from full rank.
    layer, _, _ = simulate(experts=14, tokens=40 if hidden > 1 else 6, hidden=hidden, seed=seed)
    for name in ("gram_logdet", "gld_reap", "gld_cerebras_reap"):
        ranking = SCORINGS[name](layer)
        chosen = ranking.importance > 0
        reference = explicit_d_optimal(layer, ranking.importance)
        count = int(chosen.sum())
        assert ranking.order[:count].tolist() == reference[:count]
        # Those never selected all add log(lambda): any order of them is right; ours is by id.
        assert ranking.order[count:].tolist() == np.flatnonzero(~chosen).tolist()
    assert scoring.gram_logdet(layer).importance.tolist() == (
        scoring.conditional_prob(layer).importance.tolist()
    )
    assert scoring.gld_reap(layer).importance.tolist() == scoring.reap(layer).importance.tolist()


@pytest.mark.parametrize("kernel", ["gram", "cosine"])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_d_optimal_parameters_match_explicit_determinants(kernel, ridge):
    layer, _, _ = simulate(experts=10, tokens=200, hidden=3, seed=3)
    ranking = scoring.gld_reap(layer, kernel=kernel, ridge=ridge)
    assert ranking.importance.min() > 0
    assert ranking.order.tolist() == explicit_d_optimal(layer, ranking.importance, ridge, kernel)


def test_d_optimal_is_nested():
    layer, _, _ = simulate(experts=10, tokens=200, seed=5)
    ranking = scoring.gld_reap(layer)
    for keep in range(1, 10):
        picked = explicit_d_optimal(layer, ranking.importance, keep=keep)
        assert ranking.order[:keep].tolist() == picked


def test_exhausted_rank_falls_back_on_importance():
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    fallback = np.array([1.0, 2.0, 5.0, 3.0, 1.0])
    # 3 (9) first, then 1 (4); nothing is left of rank 2, and 2, 0, 4 follow by importance, then id.
    assert greedy_log_determinant(vectors @ vectors.T, fallback).tolist() == [3, 1, 2, 0, 4]


@pytest.mark.parametrize("seed", range(5))
def test_exhausted_rank_is_seen_through_rounding(seed):
    vectors = np.random.default_rng(seed).normal(size=(12, 3))
    order = greedy_log_determinant(vectors @ vectors.T, np.arange(12.0)).tolist()
    assert order[3:] == sorted(set(range(12)) - set(order[:3]), reverse=True)


def test_ties_up_to_rounding_go_to_the_lower_id():
    free = np.array([False, True, True, True])
    for scale in (1.0, 1e-9):
        values = np.array([9.0, 1.0, 1.0 + 1e-15, 0.5]) * scale
        assert first_maximum(values, free) == 1
        assert first_maximum(np.array([9.0, 1.0, 1.0 + 1e-9, 0.5]) * scale, free) == 2


def test_experts_never_selected_come_last():
    layer, _, _ = simulate(experts=8, tokens=100, seed=1)
    dead = [2, 5]
    routing = layer.routing
    for name in ("n_selected", "prob_sum_selected", "weight_sum", "out_sq_norm_sum_selected"):
        getattr(routing, name)[dead] = 0.0
    for name in set(SCORINGS.paper) - {"preselect_prob"}:
        ranking = SCORINGS[name](layer)
        assert ranking.order[-2:].tolist() == dead, name
        assert ranking.importance[dead].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", SCORINGS)
def test_nothing_selected_and_nothing_put_out(name):
    zero = np.zeros(4)
    layer = hand_layer(
        4,
        2,
        n_selected=zero,
        prob_sum=zero,
        prob_sum_selected=zero,
        weight_sum=zero,
        gram=np.zeros((4, 4)),
        output_dot=zero,
        output_sq_norm=0.0,
    )
    ranking = SCORINGS[name](layer)
    assert ranking.order.tolist() == [0, 1, 2, 3]
    assert ranking.importance.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", SCORINGS)
def test_ranking_follows_renumbered_experts(name):
    layer, _, _ = simulate(experts=16, tokens=400, hidden=5, seed=7)
    order = np.random.default_rng(0).permutation(16)
    plain, moved = SCORINGS[name](layer), SCORINGS[name](permuted(layer, order))
    assert order[moved.order].tolist() == plain.order.tolist()
    np.testing.assert_allclose(moved.importance, plain.importance[order], rtol=1e-12)


@pytest.mark.parametrize("name", SCORINGS)
def test_equal_experts_rank_by_id(name):
    layer, _, _ = simulate(experts=6, tokens=200, seed=2)
    twice = permuted(layer, np.array([0, 1, 2, 3, 4, 5] * 2))  # e and e + 6 are the same expert
    order = SCORINGS[name](twice).order.tolist()
    assert sorted(order) == list(range(12))
    for expert in range(6):
        assert order.index(expert) < order.index(expert + 6)


@pytest.mark.parametrize("name", ["gram_logdet", "gld_reap", "omp"])
def test_order_is_free_of_units(name):
    layer, _, _ = simulate(experts=10, tokens=200, seed=4)
    for scale in (1e-24, 1e24):
        gram = replace(
            layer.gram,
            gram=layer.gram.gram * scale,
            output_dot=layer.gram.output_dot * scale,
            output_sq_norm=layer.gram.output_sq_norm * scale,
        )
        scaled = SCORINGS[name](replace(layer, gram=gram))
        assert scaled.order.tolist() == SCORINGS[name](layer).order.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_omp_matches_explicit_least_squares(seed):
    layer, output, target = simulate(experts=10, tokens=60, hidden=3, seed=seed)
    columns = output.transpose(0, 2, 1).reshape(-1, 10)
    flat = target.reshape(-1)
    picked: list[int] = []
    for _ in range(10):
        errors = {}
        for expert in set(range(10)) - set(picked):
            chosen = columns[:, [*picked, expert]]
            errors[expert] = ((flat - chosen @ np.linalg.lstsq(chosen, flat)[0]) ** 2).sum()
        picked.append(min(errors, key=errors.__getitem__))
    ranking = scoring.omp(layer)
    assert ranking.order.tolist() == picked
    alone = [
        1 - ((flat - column * (column @ flat) / (column @ column)) ** 2).sum() / (flat @ flat)
        for column in columns.T
    ]
    np.testing.assert_allclose(ranking.importance, alone, rtol=1e-9)


def test_omp_finds_the_experts_that_make_up_the_output():
    rng = np.random.default_rng(0)
    columns = np.linalg.qr(rng.normal(size=(40, 8)))[0]
    target = 3 * columns[:, 6] + 2 * columns[:, 1] - columns[:, 4]
    layer = hand_layer(
        8,
        2,
        gram=columns.T @ columns,
        output_dot=columns.T @ target,
        output_sq_norm=float(target @ target),
    )
    assert scoring.omp(layer).order[:3].tolist() == [6, 1, 4]


def test_omp_passes_over_a_copy():
    # 0 and 1 are one expert twice; 2 brings something of its own, though less.
    gram = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    layer = hand_layer(3, 1, gram=gram, output_dot=[2, 2, 0.1], output_sq_norm=5.0)
    assert scoring.omp(layer).order.tolist() == [0, 2, 1]


def test_ranking_survives_its_file():
    layers = [simulate(seed=seed, index=seed)[0] for seed in (0, 1)]
    rankings = [scoring.gld_reap(layer) for layer in layers]
    text = json.dumps(rankings_to_dict("gld_reap", layers, rankings))
    name, read = rankings_from_dict(json.loads(text), layers)
    assert name == "gld_reap"
    for one, other in zip(rankings, read, strict=True):
        assert one.order.tolist() == other.order.tolist()
        np.testing.assert_allclose(one.importance, other.importance, rtol=1e-11)
    assert json.dumps(rankings_to_dict(name, layers, read)) == text
    noise = [Ranking(r.order, r.importance * (1 + 4e-16)) for r in read]
    assert json.dumps(rankings_to_dict(name, layers, noise)) == text


def test_round_significant():
    assert round_significant(0.1234567890123456) == 0.123456789012
    assert round_significant(-1.23456789012345e-30, 3) == -1.23e-30
    assert str(round_significant(-0.0)) == "0.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("scoring"), "keys must be format, scoring, layers"),
        (lambda d: d.update(format=2), "format 2"),
        (lambda d: d.update(layers="all"), "layers a list"),
        (lambda d: d["layers"][0].pop("order"), "layer, order, importance"),
        (lambda d: d["layers"].pop(), r"covers layers \[0\], the statistics \[0, 1\]"),
        (lambda d: d["layers"].append(d["layers"][0]), "rank again"),
        (lambda d: d["layers"][0].update(layer="first"), "layer must be a whole number"),
        (lambda d: d["layers"][1].update(order=[0] * 12), "each of the 12 experts once"),
        (lambda d: d["layers"][1].update(order=["a"] * 12), "each of the 12 experts once"),
        (lambda d: d["layers"][1].update(importance=[1.0] * 11), "12 numbers, none negative"),
        (lambda d: d["layers"][1].update(importance=[-1.0] * 12), "12 numbers, none negative"),
        (lambda d: d["layers"][1].update(importance=["x"] * 12), "12 numbers, none negative"),
        (lambda d: d["layers"][1].update(importance=3), "12 numbers, none negative"),
    ],
)
def test_a_bad_ranking_is_refused(change, message):
    layers = [simulate(seed=seed, index=seed)[0] for seed in (0, 1)]
    data = rankings_to_dict("omp", layers, [scoring.omp(layer) for layer in layers])
    change(data)
    with pytest.raises(UserError, match=message):
        rankings_from_dict(data, layers)
    with pytest.raises(UserError, match="not a ranking"):
        rankings_from_dict([1], layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": 0}, "top-k is 0"),
        ({"top_k": 4}, "top-k is 4; it must lie between 1 and the 3"),
        ({"top_k": 1, "n_tokens": 0}, "saw no token"),
        ({"top_k": 1, "gram": np.eye(4)}, r"gram has shape \[4, 4\] where \[3, 3\]"),
        ({"top_k": 1, "prob_sum": np.ones(2)}, r"prob_sum has shape \[2\] where \[3\]"),
        ({"top_k": 1, "output_dot": [1, np.nan, 1]}, "output_dot holds NaN or infinity"),
        ({"top_k": 1, "output_sq_norm": float("inf")}, "output_sq_norm holds NaN or infinity"),
    ],
)
def test_statistics_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        hand_layer(3, **given)
