"""Norms and tails of logits, with the rows that break the statement of a single row."""

import math

import pytest
import torch

from lit_sparse import theory

D, E = 24, 6


def _factors(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, D, E, generator=draw, dtype=torch.float64) for _ in range(2)]


def test_the_norm_of_the_product_is_that_of_the_product():
    w_q, w_k = _factors(3, 2)
    found = theory.product_norm(w_q, w_k)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(w_q @ w_k.mT))
    assert theory.product_norm(w_q.float()[0], w_k.float()[0]).dtype == torch.float64
    with pytest.raises(ValueError, match="equal d_head"):
        theory.product_norm(w_q, w_k[..., :3])


def test_factors_whose_product_vanishes_have_norm_zero():
    """Though neither is zero: each has rank 1, along orthogonal directions of the head."""
    heads = torch.eye(E, dtype=torch.float64)
    w_q, w_k = (_factors()[i].sum(-1, keepdim=True) * heads[i] for i in range(2))
    assert theory.product_norm(w_q, w_k) == 0
    assert theory.product_norm(w_q, w_q) > 1


def test_the_scale_holds_in_root_mean_square_over_rows_only():
    w_q, w_k = _factors()
    w = w_q @ w_k.mT / math.sqrt(E)
    bound = 1.5
    scale = theory.logit_scale(bound, torch.linalg.matrix_norm(w))
    draw = torch.Generator().manual_seed(2)
    rows = bound * (2 * torch.rand(20_000, D, generator=draw, dtype=torch.float64) - 1)
    each = bound * (rows @ w).norm(dim=-1)
    assert each.square().mean().sqrt() <= scale
    worst = theory.worst_row_logit_scale(bound, torch.linalg.matrix_norm(w), D)
    assert each.max() <= worst


def test_one_row_exceeds_the_scale_by_the_root_of_the_width():
    direction = torch.ones(D, 1, dtype=torch.float64) / math.sqrt(D)
    w, bound = direction @ direction.mT, 2.0
    row = torch.full((D,), bound, dtype=torch.float64)
    of_the_row = bound * (row @ w).norm()
    scale = theory.logit_scale(bound, 1.0)
    torch.testing.assert_close(of_the_row, math.sqrt(D) * scale)
    torch.testing.assert_close(of_the_row, theory.worst_row_logit_scale(bound, 1.0, D))


def _logits(mean, count=200_000):
    """Logits of one row with keys of entries in mean +- 1, and the row's R_i (bound of |x|: 1 +
    |mean|)."""
    draw = torch.Generator().manual_seed(4)
    direction = torch.rand(D, generator=draw) + 0.5
    signs = torch.randint(0, 2, (count, D), generator=draw) * 2.0 - 1
    return (signs + mean) @ direction, (1 + abs(mean)) * direction.norm()


def test_the_tail_bounds_logits_of_independent_entries_of_mean_zero():
    logits, r = _logits(0.0)
    for t in (0.5, 1, 2, 3, 4):
        measured = (logits.abs() >= t * r).double().mean()
        assert measured <= theory.logit_tail(t * r, r)
    assert theory.logit_tail(0.0, 1.0) == 1


def test_the_tail_fails_for_entries_with_a_mean():
    logits, r = _logits(3.0)
    t = 3 * r
    assert (logits.abs() >= t).double().mean() > 0.9 > theory.logit_tail(t, r)


def test_the_largest_logit_stays_under_its_bound():
    logits, r = _logits(0.0)
    rows = logits.view(200, 1000)
    bound = theory.largest_logit_bound(r, 1000, 0.05)
    assert (rows.abs().amax(-1) <= bound).double().mean() >= 0.95
    # The inverse of the tail: n keys at delta / n each.
    torch.testing.assert_close(1000 * theory.logit_tail(bound, r), torch.tensor(0.05).double())


def test_averages_of_the_log_floor_of_keys_are_within_the_error():
    n, dim, error = 64, 4, 0.3
    k = math.ceil(theory.keys_floor(1.0, n, dim, 0.1, error))
    draw = torch.Generator().manual_seed(6)
    values = torch.randint(0, 2, (100, n, dim, k), generator=draw, dtype=torch.float32) * 2 - 1
    worst = values.mean(-1).abs().amax((1, 2))
    assert (worst <= error).double().mean() >= 0.9
    # One factor e in the context costs 2 (B / error)^2 keys: the floor grows as ln n.
    grown = theory.keys_floor(1.0, n * math.e, dim, 0.1, error)
    assert grown.item() - theory.keys_floor(1.0, n, dim, 0.1, error).item() == pytest.approx(
        2 / error**2
    )


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: theory.logit_scale(-1.0, 1.0), "input_bound must"),
        (lambda: theory.logit_tail(1.0, 0.0), "r must"),
        (lambda: theory.largest_logit_bound(1.0, 10, 0.0), "delta must"),
        (lambda: theory.keys_floor(1.0, 10, 4, 0.1, 0.0), "error must"),
        (lambda: theory.keys_floor(1.0, 10, 0, 0.1, 1.0), "dim must"),
    ],
)
def test_arguments_out_of_range_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
