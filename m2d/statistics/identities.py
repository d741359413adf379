"""What holds of all statistics, whatever the teacher: cheap to check on every reading.

A digest says that numbers are those that were written; these also find files that something else
wrote, and files of earlier releases, which have none.
"""

from pathlib import Path

import numpy as np

from m2d.choose.layer_statistics import GramStatistics, RoutingStatistics
from m2d.choose.neuron_statistics import NeuronStatistics
from m2d.errors import UserError

# Of the largest entry. Inner products are the same both ways, but for the order of sums on a GPU.
ASYMMETRY = 1e-4


def require_routing(path: str | Path, layer: int, top_k: int, routing: RoutingStatistics) -> None:
    """Raise a UserError unless every token selected top-k experts, and none of them twice."""
    selected, tokens = routing.n_selected, routing.n_tokens
    if selected.sum() != top_k * tokens or not ((selected >= 0) & (selected <= tokens)).all():
        raise UserError(
            f"{path}: layer {layer}: {tokens} tokens select {top_k} experts each, but the experts' "
            f"n_selected are from {selected.min():.0f} to {selected.max():.0f}, "
            f"{selected.sum():.0f} together; make the file again"
        )


def require_symmetric(path: str | Path, layer: int, gram: GramStatistics) -> None:
    """Raise a UserError unless the matrices of inner products are symmetric, their squares >= 0."""
    for name in ("gram", "weight_gram", "router_gram"):
        matrix = getattr(gram, name)
        square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
        if not square or not matrix.size:
            raise UserError(f"{path}: layer {layer}: {name} has shape {list(matrix.shape)}")
        if np.abs(matrix - matrix.T).max() > ASYMMETRY * np.abs(matrix).max():
            raise UserError(f"{path}: layer {layer}: {name} is not symmetric; make the file again")
        if np.diag(matrix).min() < 0:
            raise UserError(
                f"{path}: layer {layer}: {name} has a square below zero; make the file again"
            )


def require_neurons(path: str | Path, layer: NeuronStatistics) -> None:
    """Raise a UserError unless the arrays agree on E and I, and hold what sums of squares can."""
    where = f"{path}: layer {layer.layer}"
    shape = layer.weighted_square_sum.shape
    if layer.n_tokens < 1:
        raise UserError(f"{where}: the statistics saw no token; calibrate on some")
    expected = {"weighted_square_sum": shape, "down_square_norm": shape, "mean_weight": shape[:1]}
    if layer.greedy is not None:
        expected |= {"greedy": (len(layer.greedy), 2), "greedy_gain": (len(layer.greedy),)}
    for name, of in expected.items():
        array = np.asarray(getattr(layer, name))
        if array.shape != of or len(shape) != 2 or not array.size:
            raise UserError(f"{where}: {name} has shape {list(array.shape)}; make the file again")
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {name} holds NaN or infinity; make the file again")
    for name in ("weighted_square_sum", "down_square_norm"):
        if getattr(layer, name).min() < 0:
            raise UserError(f"{where}: {name} has a square below zero; make the file again")
    if not np.isfinite(layer.shared_weight):
        raise UserError(f"{where}: shared_weight is not finite; make the file again")
    if layer.greedy is not None:
        inside = ((layer.greedy >= 0) & (layer.greedy < shape)).all()
        if not inside or len(np.unique(layer.greedy, axis=0)) != len(layer.greedy):
            raise UserError(
                f"{where}: greedy must name neurons of {shape[0]} experts of {shape[1]}, each "
                "once; make the file again"
            )
