"""Statements for any row, against brute force: exact softmax of random rows, every k."""

import math

import pytest
import torch

from lit_sparse import theory

N = 48
SCALES = (1.0, 4.0, 16.0)


def _rows(scale, count=6, n=N):
    """Gaussian, heavy-tailed and tied logits, sorted down, and their softmax; float64 [R, n]."""
    draw = torch.Generator().manual_seed(int(scale))
    gaussian = torch.randn(count, n, generator=draw, dtype=torch.float64)
    logits = torch.cat([gaussian, gaussian**3, gaussian.round()]) * scale
    logits = logits.sort(dim=-1, descending=True).values
    return logits, logits.softmax(-1)


def _missed(p):
    """Mass of all but the k largest, k = 1 .. n-1: [R, n-1]."""
    return p.flip(-1).cumsum(-1).flip(-1)[:, 1:]


def _two_levels(n, k, gap):
    """k logits that are `gap` nats above the others."""
    logits = torch.zeros(n, dtype=torch.float64)
    logits[:k] = gap
    return logits


@pytest.mark.parametrize("scale", SCALES)
def test_masses_and_divergence_are_those_of_the_softmax(scale):
    logits, p = _rows(scale)
    kept = torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    kept[:, 0] = True
    lse_kept = logits.masked_fill(~kept, -math.inf).logsumexp(-1)
    missed = theory.missed_mass(lse_kept, logits.logsumexp(-1))
    dropped = p.masked_fill(kept, 0).sum(-1)
    torch.testing.assert_close(missed, dropped, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(theory.captured_mass(lse_kept, logits.logsumexp(-1)), 1 - dropped)
    restricted = p.masked_fill(~kept, 0) / p.masked_fill(~kept, 0).sum(-1, keepdim=True)
    torch.testing.assert_close(missed, (p - restricted).abs().sum(-1) / 2)
    divergence = torch.xlogy(restricted, restricted / p.clamp(min=1e-300)).sum(-1)
    torch.testing.assert_close(theory.kl_of_missed_mass(missed), divergence)


@pytest.mark.parametrize("scale", SCALES)
def test_no_row_breaks_a_bound_at_any_k(scale):
    logits, p = _rows(scale)
    k = torch.arange(1, N)
    missed, slack = _missed(p), 1 + 1e-12
    assert (p[:, 1:] <= theory.entrywise_bound(k) * slack).all()
    gaps = logits[:, :-1] - logits[:, 1:]
    assert (missed <= theory.gap_certificate(N, k, gaps) * slack).all()
    span = (logits[:, :1] - logits[:, -1:]).expand_as(gaps)
    assert (missed >= theory.least_missed_mass(N, k, span) / slack - 1e-15).all()
    reached = missed > 1e-12  # below, 1 - missed is rounded
    needed = theory.required_logit_range(N, k.expand_as(span)[reached], missed[reached])
    assert (span[reached] >= needed - 1e-9).all()


@pytest.mark.parametrize("gap", [0.0, 1.0, 7.0, 40.0])
@pytest.mark.parametrize("k", [1, 5, N - 1])
def test_two_level_rows_attain_the_bounds_of_the_mass(gap, k):
    missed = _missed(_two_levels(N, k, gap).softmax(-1)[None])[0, k - 1]
    torch.testing.assert_close(theory.gap_certificate(N, k, gap), missed)
    torch.testing.assert_close(theory.least_missed_mass(N, k, gap), missed)
    if 0 < gap < 20:
        torch.testing.assert_close(
            theory.required_logit_range(N, k, missed).item(), gap, rtol=1e-9, atol=1e-9
        )


def test_equal_weights_attain_the_entrywise_bound():
    assert theory.entrywise_bound(9).item() == pytest.approx(0.1)
    assert theory.entrywise_bound(0).item() == 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("common", [0.0, 50.0])
def test_the_output_moves_by_no_more_than_the_bounds(scale, common):
    _, p = _rows(scale)
    draw = torch.Generator().manual_seed(1)
    v = torch.randn(N, 3, generator=draw, dtype=torch.float64) + common
    missed, norm, diameter = _missed(p), v.norm(dim=-1).max(), torch.cdist(v, v).max()
    for k in range(1, N):
        kept = p[:, :k] / p[:, :k].sum(-1, keepdim=True)
        error = (p @ v - kept @ v[:k]).norm(dim=-1)
        bound = theory.output_error_bound_of_diameter(missed[:, k - 1], diameter)
        assert (error <= bound + 1e-13).all()  # rounding of values up to 50
    sharper = theory.output_error_bound_of_diameter(missed, diameter)
    assert (sharper <= theory.output_error_bound(missed, norm)).all()


def test_opposite_values_attain_the_output_bounds():
    p = _two_levels(10, 4, 1.0).softmax(-1)
    v = torch.ones(10, 1, dtype=torch.float64)
    v[4:] = -1
    missed = p[4:].sum()
    error = ((p @ v) - 1).abs()[0]
    torch.testing.assert_close(theory.output_error_bound(missed, 1.0), error)
    torch.testing.assert_close(theory.output_error_bound_of_diameter(missed, 2.0), error)


def _independent_error(n, k, rows=400):
    """Predicted error of the output, in value norms, of Gaussian logits of sigma 1: mean over
    rows."""
    draw = torch.Generator().manual_seed(n)
    p = torch.randn(rows, n, generator=draw, dtype=torch.float64).softmax(-1)
    p = p.sort(dim=-1, descending=True).values
    missed = p[:, k:].sum(-1)
    kept, rest = p[:, :k] / (1 - missed[:, None]), p[:, k:] / missed[:, None]
    collisions = (kept**2).sum(-1), (rest**2).sum(-1)
    return theory.output_error_of_independent_values(missed, *collisions).mean(), missed.mean()


def test_independent_values_have_the_predicted_error():
    draw = torch.Generator().manual_seed(5)
    p = _rows(1.0)[1][:1]
    missed = p[:, 6:].sum()
    v = torch.randn(N, 20_000, generator=draw, dtype=torch.float64)
    error = (p @ v - p[:, :6] @ v[:6] / (1 - missed)).square().mean().sqrt()
    collisions = [(part**2).sum() / part.sum() ** 2 for part in (p[:, :6], p[:, 6:])]
    predicted = theory.output_error_of_independent_values(missed, *collisions)
    torch.testing.assert_close(predicted, error, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("keys", "slope"),
    [
        (lambda n: n**0.5, -0.21),
        (lambda n: n**0.75, -0.31),
        (lambda n: 0.5 * math.log2(n), -0.05),
    ],
)
def test_the_output_error_falls_though_the_missed_mass_grows(keys, slope):
    lengths = (1024, 16384)
    errors, missed = zip(*(_independent_error(n, round(keys(n)), 60) for n in lengths), strict=True)
    measured = math.log(errors[1] / errors[0]) / math.log(lengths[1] / lengths[0])
    assert measured == pytest.approx(slope, abs=0.04)
    assert missed[1] > missed[0]


def test_the_range_that_the_square_root_law_requires():
    n = torch.tensor([8192, 32768, 131072, 1048576])
    required = theory.required_logit_range(n, 16 * n.sqrt(), 0.05)
    assert [round(x, 1) for x in required.tolist()] == [4.5, 5.3, 6.0, 7.1]
    assert (theory.least_missed_mass(n, 16 * n.sqrt(), required) - 0.05).abs().max() < 1e-12


def test_enough_keys_need_no_range():
    assert theory.required_logit_range(100, 100, 0.05) == 0
    assert theory.required_logit_range(100, 200, 0.05) == 0
    assert theory.required_logit_range(100, 97, 0.05) == 0
    assert theory.least_missed_mass(100, 100, 3.0) == 0


def test_large_ranges_do_not_overflow():
    assert theory.least_missed_mass(1e6, 10, 5000.0) == 0
    assert theory.gap_certificate(1e6, 10, 5000.0) == 0


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: theory.least_missed_mass(0, 1, 1.0), "n must"),
        (lambda: theory.required_logit_range(10, 0, 0.5), "k must"),
        (lambda: theory.required_logit_range(10, 1, 1.0), "missed must"),
        (lambda: theory.required_logit_range(10, 1, math.nan), "missed must"),
        (lambda: theory.gap_certificate(10, 1, -1.0), "gap must"),
        (lambda: theory.kl_of_missed_mass(torch.tensor([0.5, 1.5])), r"missed must .* got 1\.5"),
        (lambda: theory.output_error_bound(0.5, -1.0), "value_norm must"),
        (lambda: theory.missed_mass(math.nan, 0.0), "lse_kept must"),
    ],
)
def test_arguments_out_of_range_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_numbers_and_tensors_broadcast_in_float64():
    found = theory.least_missed_mass(torch.tensor([[100], [1000]]), torch.tensor([5.0, 10.0]), 2)
    assert found.shape == (2, 2)
    assert found.dtype == torch.float64
    assert theory.least_missed_mass(100, 5, 2).shape == ()
