"""Statistics of one MoE layer for the tests of m2d.choose: random ones, and ones set by hand."""

from typing import Any

import numpy as np

from m2d.choose.layer_statistics import GramStatistics, LayerStatistics, RoutingStatistics

ROUTING = (
    "n_selected",
    "prob_sum",
    "prob_sum_selected",
    "weight_sum",
    "out_norm_sum_selected",
    "weighted_out_norm_sum",
    "out_sq_norm_sum_selected",
)


def hand_layer(experts: int, top_k: int, n_tokens: int = 10, index: int = 0, **given: Any):
    """A layer in which everything not given is 1 per expert, and every Gram matrix the identity."""
    routing = {name: np.asarray(given.pop(name, np.ones(experts)), float) for name in ROUTING}
    gram = {
        "gram": np.eye(experts),
        "output_dot": np.ones(experts),
        "output_sq_norm": 1.0,
        "weight_gram": np.eye(experts),
        "router_gram": np.eye(experts),
        "output_norm": np.ones(experts),
    }
    for name in gram:
        if name in given:
            value = given.pop(name)
            gram[name] = value if np.isscalar(value) else np.asarray(value, float)
    assert not given, given
    return LayerStatistics(
        index, top_k, RoutingStatistics(n_tokens, **routing), GramStatistics(**gram)
    )


def simulate(
    experts: int = 12,
    top_k: int = 3,
    tokens: int = 60,
    hidden: int = 4,
    seed: int = 0,
    index: int = 0,
) -> tuple[LayerStatistics, np.ndarray, np.ndarray]:
    """Statistics of random tokens, and the expert outputs [tokens, E, hidden] and y behind them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) + rng.normal(size=experts)
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.zeros_like(prob)
    np.put_along_axis(chosen, np.argsort(-prob, axis=1)[:, :top_k], 1.0, axis=1)
    weight = prob * chosen / (prob * chosen).sum(1, keepdims=True)
    output = rng.normal(size=(tokens, experts, hidden)) * rng.uniform(0.5, 2, (1, experts, 1))
    target = np.einsum("te,teh->th", weight, output)
    norm = np.linalg.norm(output, axis=2)
    parameters = rng.normal(size=(experts, 30))
    router = rng.normal(size=(experts, 5))
    layer = LayerStatistics(
        index,
        top_k,
        RoutingStatistics(
            tokens,
            chosen.sum(0),
            prob.sum(0),
            (prob * chosen).sum(0),
            weight.sum(0),
            (norm * chosen).sum(0),
            (norm * weight).sum(0),
            (norm**2 * chosen).sum(0),
        ),
        GramStatistics(
            np.einsum("tih,tjh->ij", output, output) / tokens,
            np.einsum("tih,th->i", output, target) / tokens,
            float((target**2).sum() / tokens),
            parameters @ parameters.T,
            router @ router.T,
            norm.mean(0),
        ),
    )
    return layer, output, target


def permuted(layer: LayerStatistics, order: np.ndarray) -> LayerStatistics:
    """The same layer with experts renumbered: expert e of the result is order[e] of `layer`."""
    routing = {name: getattr(layer.routing, name)[order] for name in ROUTING}
    gram = layer.gram
    square = np.ix_(order, order)
    return LayerStatistics(
        layer.layer,
        layer.top_k,
        RoutingStatistics(layer.routing.n_tokens, **routing),
        GramStatistics(
            gram.gram[square],
            gram.output_dot[order],
            gram.output_sq_norm,
            gram.weight_gram[square],
            gram.router_gram[square],
            None if gram.output_norm is None else gram.output_norm[order],
        ),
    )
