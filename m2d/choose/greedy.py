"""Greedy forward selection from a Gram matrix, by one incremental Cholesky factor.

Shapes: N candidates, H outputs, |S| picked ones. A pick costs O(N (|S| + H)), and nothing is ever
factorised afresh. Both selections are nested: a shorter one is a prefix of a longer one.
"""

import numpy as np

from m2d.choose.layer_statistics import Indices, Matrix, Vector
from m2d.errors import UserError

TIE = 1e-12  # relative: differences below this are rounding, and the lower index wins


def greedy_log_determinant(matrix: Matrix, fallback: Vector) -> Indices:
    """All N indices in the order in which each raises log det(matrix_SS) most.

    matrix: [N, N] symmetric, positive semi-definite. Adding j multiplies the determinant by the
    Schur complement d_j = m_jj - m_jS m_SS^-1 m_Sj. Once every d_j is 0 to rounding (the rank is
    exhausted), the others follow by `fallback` [N], highest first.
    """
    candidates = len(matrix)
    factor = np.zeros((candidates, candidates))  # row s: column of the Cholesky factor, pick s
    schur = np.array(np.diagonal(matrix))
    exhausted = TIE * float(schur.max())
    free = np.ones(candidates, dtype=bool)
    order: list[int] = []
    while len(order) < candidates:
        pick = first_maximum(schur, free)
        if schur[pick] <= exhausted:
            break
        row = factor[len(order)]
        row[:] = cholesky_row(matrix[pick], factor[: len(order)], pick, schur[pick])
        schur -= row**2
        free[pick] = False
        order.append(pick)
    return np.concatenate([np.array(order, dtype=np.int64), remaining(free, fallback)])


def greedy_regression(
    gram: Matrix, cross: Matrix, count: int, ridge: float, fallback: Vector
) -> tuple[Indices, Vector]:
    """`count` of N regressors, each the one that lowers the squared error of the fit most.

    Forward selection for min_A ||Y - sum_j f_j A_j||^2 + penalty ||A||^2 with all coefficients
    refitted at every pick (orthogonal least squares), from inner products alone:
      gram      [N, N]: <f_i, f_j>
      cross     [N, H]: <f_j, Y_h>; A is [N, H]
      ridge     penalty / mean(diag gram); above 0 it keeps near-copies from being picked for noise
      fallback  [N]: order of those left when no further one helps, highest first
    Returns the picks [count] and by how much each lowered the error [count].
    """
    mean = float(np.diagonal(gram).mean())
    if mean <= 0.0:
        return remaining(np.ones(len(gram), dtype=bool), fallback)[:count], np.zeros(count)
    penalty = ridge * mean
    factor = np.zeros((count, len(gram)))  # as in greedy_log_determinant
    explained = np.zeros((count, cross.shape[1]))  # <what pick s adds to the span, Y>, normalised
    schur = np.diagonal(gram) + penalty  # squared length of each regressor beyond the picked span
    energy = np.einsum("nh,nh->n", cross, cross)  # squared inner product with what is left of Y
    free = np.ones(len(gram), dtype=bool)
    order: list[int] = []
    gains = np.zeros(count)
    while len(order) < count:
        usable = free & (schur > TIE * mean)
        gain = np.zeros(len(gram))
        gain[usable] = energy[usable] / schur[usable]
        pick = first_maximum(gain, free)
        if gain[pick] <= TIE * gains[0]:
            break
        step, root = len(order), np.sqrt(schur[pick])
        row = cholesky_row(gram[pick], factor[:step], pick, schur[pick])
        new = (cross[pick] - factor[:step, pick] @ explained[:step]) / root
        # The residual's inner products are not kept, [N, H], only their squares: each loses the
        # part row * new.
        overlap = cross @ new - (explained[:step] @ new) @ factor[:step]
        energy = np.maximum(energy - 2 * row * overlap + row**2 * (new @ new), 0.0)
        schur = schur - row**2
        factor[step], explained[step], gains[step] = row, new, gain[pick]
        free[pick] = False
        order.append(pick)
    left = remaining(free, fallback)[: count - len(order)]
    return np.concatenate([np.array(order, dtype=np.int64), left]), gains


def cholesky_row(inner: Vector, factor: Matrix, pick: int, schur: float) -> Vector:
    """The Cholesky factor's next column, over all N candidates.

    inner: [N] the matrix's row of the pick (its own entry, where a penalty would be added, does not
    matter to the others); factor: [|S|, N] the columns so far; schur: the pick's Schur complement.
    """
    return (inner - factor[:, pick] @ factor) / np.sqrt(schur)


def first_maximum(values: Vector, free: np.ndarray) -> int:
    """The lowest free index whose value is the free maximum, to a relative tolerance of TIE."""
    best = float(values[free].max())
    if not np.isfinite(best):
        raise UserError("no order follows from statistics that are not finite")
    return int(np.flatnonzero(free & (values >= best - TIE * abs(best)))[0])


def remaining(free: np.ndarray, fallback: Vector) -> Indices:
    """The free indices by `fallback`, highest first, the lower index first among equals."""
    order = np.argsort(-fallback, kind="stable")
    return order[free[order]].astype(np.int64)
