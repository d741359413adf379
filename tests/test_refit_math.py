"""Ridge regression from accumulated moments, against numpy's least squares on the tokens."""

import numpy as np
import pytest
import torch

from m2d.errors import UserError
from m2d.refit.ridge import choose_ridge, refit_down, solve_ridge, squared_error
from m2d.statistics.moments import Moments

WIDTH, HIDDEN = 6, 4


def with_ones(h):
    """h [T, W] and a last column of ones, so that D's last row is the bias."""
    return torch.cat([h, h.new_ones(len(h), 1)], dim=1)


def tokens(count, seed=0, noise=0.1, dtype=torch.float64):
    """Activations [count, W], targets [count, H], and the down projection [W, H] between them."""
    rng = np.random.default_rng(seed)
    down = np.random.default_rng(99).normal(size=(WIDTH, HIDDEN))
    h = rng.normal(size=(count, WIDTH)) * np.array([3, 1, 1, 0.5, 0.2, 0.1])
    y = h @ down + noise * rng.normal(size=(count, HIDDEN))
    return torch.tensor(h, dtype=dtype), torch.tensor(y, dtype=dtype), torch.tensor(down)


def moments_of(h, y, block=7):
    moments = Moments.zero(h.shape[1], y.shape[1])
    for start in range(0, len(h), block):
        moments.add(h[start : start + block], y[start : start + block])
    return moments


def test_moments_add_up():
    h, y, _ = tokens(40)
    whole = moments_of(h, y)
    parts = moments_of(h[:13], y[:13]) + moments_of(h[13:], y[13:])
    for moments in (whole, parts):
        assert moments.n_tokens == 40
        torch.testing.assert_close(moments.hth, h.T @ h)
        torch.testing.assert_close(moments.hty, h.T @ y)
        torch.testing.assert_close(moments.yty, (y**2).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_activations_give_float64_moments(dtype):
    h, y, _ = tokens(64, dtype=dtype)
    moments = moments_of(h, y)
    assert moments.hth.dtype == moments.hty.dtype == moments.yty.dtype == torch.float64
    # What is lost is the input's own rounding, nothing in the sums.
    torch.testing.assert_close(moments.hth, h.double().T @ h.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.hty, h.double().T @ y.double(), rtol=1e-5, atol=1e-5)


def test_error_is_that_of_the_tokens():
    h, y, down = tokens(30)
    for candidate in (down, torch.zeros_like(down), down + 1):
        expected = float(((y - h @ candidate) ** 2).sum(1).mean())
        assert squared_error(moments_of(h, y), candidate) == pytest.approx(expected, rel=1e-10)


def test_no_ridge_is_least_squares():
    h, y, _ = tokens(30)
    moments = moments_of(h, y)
    expected = np.linalg.lstsq(h.numpy(), y.numpy())[0]
    found = solve_ridge(moments.hth, moments.hty, 0.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    # What `towards` says is then without effect.
    again = solve_ridge(moments.hth, moments.hty, 0.0, torch.ones(WIDTH, HIDDEN))
    np.testing.assert_allclose(again.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("free", [0, 1])
def test_ridge_is_least_squares_with_rows_appended(ridge, drawn, free):
    h, y, down = tokens(30)
    h = with_ones(h) if free else h
    towards = torch.cat([down, down[:1]])[: h.shape[1]] + 0.5
    moments = moments_of(h, y)
    root = np.sqrt(ridge * np.diag(moments.hth).mean()) * np.eye(h.shape[1])
    root = root[: h.shape[1] - free]
    goal = root @ towards.numpy() if drawn else np.zeros((len(root), HIDDEN))
    expected = np.linalg.lstsq(np.vstack([h.numpy(), root]), np.vstack([y.numpy(), goal]))[0]
    found = solve_ridge(moments.hth, moments.hty, ridge, towards if drawn else None, free)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_a_bias_is_recovered():
    h, _, down = tokens(50)
    bias = torch.tensor([5.0, -3.0, 100.0, 0.0], dtype=torch.float64)
    moments = moments_of(with_ones(h), h @ down + bias)
    found = solve_ridge(moments.hth, moments.hty, 1e-12, free=1)
    torch.testing.assert_close(found[-1], bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[:-1], down, rtol=1e-6, atol=1e-6)


def test_a_student_that_can_represent_the_target_recovers_it():
    h, y, down = tokens(200, noise=0.0)
    parts = moments_of(h[:150], y[:150]), moments_of(h[150:], y[150:])
    found, choice = refit_down(*parts, torch.zeros_like(down), ridges=[1e-2, 1e-12])
    assert choice.ridge == 1e-12
    torch.testing.assert_close(found, down, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 1.0, 1e6])
def test_drawn_towards_the_current_one_the_error_never_rises(ridge):
    for seed in range(5):
        h, y, down = tokens(8, seed=seed, noise=3.0)
        moments = moments_of(h, y)
        current = down + torch.randn(down.shape, generator=torch.Generator().manual_seed(seed))
        found = solve_ridge(moments.hth, moments.hty, ridge, current)
        assert squared_error(moments, found) <= squared_error(moments, current)


def test_what_the_tokens_never_activate_stays_as_it_is():
    h, y, down = tokens(30)
    h[:, 2] = 0.0
    moments = moments_of(h, y)
    found = solve_ridge(moments.hth, moments.hty, 1e-6, down)
    torch.testing.assert_close(found[2], down[2])


def test_the_ridge_with_the_least_held_out_error_is_chosen():
    h, y, down = tokens(15, noise=1.0)  # few and noisy: the least ridge fits the noise
    fit, held_out = moments_of(h, y), moments_of(*tokens(500, seed=1, noise=1.0)[:2])
    ridges = [1e-6, 1e-2, 1e-1, 1.0, 10.0]
    current = down + 0.5
    choice = choose_ridge(fit, held_out, current, ridges)
    expected = {
        ridge: squared_error(held_out, solve_ridge(fit.hth, fit.hty, ridge, current))
        for ridge in ridges
    }
    assert choice.errors == expected
    assert choice.ridge == min(expected, key=expected.__getitem__)
    assert 1e-6 < choice.ridge < 10.0
    assert choice.after == min(expected.values()) < choice.before
    assert choice.before == squared_error(held_out, current)
    # Solved again on all tokens with that ridge.
    both = fit + held_out
    found, again = refit_down(fit, held_out, current, ridges)
    assert again == choice
    torch.testing.assert_close(found, solve_ridge(both.hth, both.hty, choice.ridge, current))


def test_of_equal_ridges_the_largest_is_chosen():
    fit = Moments.zero(2, 1)
    fit.add(torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
    held_out = Moments.zero(2, 1)
    held_out.add(torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    choice = choose_ridge(fit, held_out, torch.zeros(2, 1), [1.0, 0.1])
    assert choice.ridge is None  # nor is any better than the one at hand
    assert choice.after == choice.before == 1.0
    held_out.add(torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64))
    assert choose_ridge(fit, held_out, torch.zeros(2, 1), [1e-20, 0.0]).ridge == 1e-20


def test_no_refit_where_the_current_one_is_best():
    h, y, down = tokens(7, noise=5.0)
    held_out = moments_of(*tokens(2000, seed=1, noise=0.0)[:2])
    found, choice = refit_down(moments_of(h, y), held_out, down, [1e-4, 1e-2])
    assert choice.ridge is None
    assert choice.after == choice.before == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(found, down)


def test_ridges_without_a_solution_are_left_out():
    h, y, down = tokens(40)
    h[:, 3] = 0.0  # singular without a ridge
    fit = moments_of(h, y)
    with pytest.raises(torch.linalg.LinAlgError):
        solve_ridge(fit.hth, fit.hty, 0.0)
    choice = choose_ridge(fit, fit, torch.zeros_like(down), [0.0, 1e-3])
    assert set(choice.errors) == {1e-3}
    assert choice.ridge == 1e-3
    none = choose_ridge(fit, fit, torch.zeros_like(down), [0.0])
    assert none.ridge is None


def test_tokens_that_cannot_serve_are_refused():
    h, y, down = tokens(10)
    some = moments_of(h, y)
    with pytest.raises(UserError, match="tokens to fit and to hold out"):
        refit_down(some, Moments.zero(WIDTH, HIDDEN), down)
    with pytest.raises(UserError, match="tokens to fit and to hold out"):
        refit_down(Moments.zero(WIDTH, HIDDEN), some, down)
    h[3, 2] = float("inf")
    with pytest.raises(UserError, match="NaN or infinity"):
        refit_down(moments_of(h, y), some, down)
