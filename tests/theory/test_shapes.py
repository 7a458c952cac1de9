"""Closed forms against rows of the shape that they are for."""

import math

import pytest
import torch

from lit_sparse import theory
from lit_sparse.budget import Budget

LENGTHS = torch.tensor([8192, 32768, 131072, 1048576])


def _needed(p, missed):
    """Fewest keys that miss at most that mass; p [..., n] sorted down."""
    return (p.cumsum(-1) < 1 - missed).sum(-1) + 1


def _gaussian(sigma, n, rows=4):
    draw = torch.Generator().manual_seed(n)
    return (sigma * torch.randn(rows, n, generator=draw, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("missed", [0.01, 0.05, 0.5])
def test_gaussian_logits_need_a_fixed_share_of_the_keys(sigma, missed):
    n = 40_000
    share = _needed(_gaussian(sigma, n).sort(descending=True).values, missed).double().mean() / n
    assert theory.gaussian_keys_fraction(sigma, missed).item() == pytest.approx(
        share.item(), abs=0.005
    )


def test_equal_logits_need_all_but_the_missed_share():
    assert theory.gaussian_keys_fraction(0.0, 0.05).item() == pytest.approx(0.95)


def test_the_standard_deviation_of_collapse():
    sigma = theory.collapse_sigma(LENGTHS)
    assert [round(x, 2) for x in sigma.tolist()] == [4.25, 4.56, 4.85, 5.27]
    torch.testing.assert_close(theory.collapse_length(sigma), LENGTHS.double())
    torch.testing.assert_close(theory.gamma(sigma, LENGTHS), torch.ones(4).double())


def test_entropy_and_heaviest_weight_of_the_random_energy_model():
    """To leading order: what is left over is O(1) nats of ln n, so slopes between lengths agree."""
    short, long = 256, 131072
    gamma = 0.25
    span = math.log(long / short)
    measured = []
    for n, rows in ((short, 400), (long, 32)):
        p = _gaussian(math.sqrt(2 * gamma * math.log(n)), n, rows)
        measured.append((-torch.xlogy(p, p).sum(-1).mean(), p.amax(-1).log().mean()))
    entropy = (measured[1][0] - measured[0][0]) / span
    assert entropy.item() == pytest.approx(theory.rem_exponent(gamma).item(), abs=0.05)
    heaviest = (measured[1][1] - measured[0][1]) / span
    predicted = theory.rem_max_weight(gamma, long).log() / math.log(long)
    assert heaviest.item() == pytest.approx(predicted.item(), abs=0.05)
    torch.testing.assert_close(
        theory.gamma_of_entropy(theory.rem_entropy(gamma, long), long).item(), gamma
    )


def test_a_collapsed_row_has_no_entropy_and_one_weight():
    gamma = torch.tensor([1.0, 1.5])
    assert theory.rem_entropy(gamma, 1000).tolist() == [0, 0]
    assert theory.rem_max_weight(gamma, 1000).tolist() == [1, 1]
    assert theory.rem_exponent(gamma).tolist() == [0, 0]


@pytest.mark.parametrize(("a", "within"), [(0.0, 0.01), (0.3, 0.01), (0.5, 0.02), (1.0, 0.13)])
def test_ranks_of_a_slow_power_law(a, within):
    n, missed = 100_000, 0.2
    p = torch.arange(1, n + 1, dtype=torch.float64) ** -a
    needed = _needed(p / p.sum(), missed).item()
    assert theory.rank_power_keys(n, a, missed).item() == pytest.approx(needed, rel=within)


@pytest.mark.parametrize("a", [1.8, 2.0, 3.0])
@pytest.mark.parametrize("missed", [0.02, 0.1])
def test_ranks_of_a_fast_power_law_need_a_constant(a, missed):
    n = 200_000
    p = torch.arange(1, n + 1, dtype=torch.float64) ** -a
    needed = _needed(p / p.sum(), missed).item()
    assert theory.rank_power_keys(n, a, missed).item() == pytest.approx(needed, abs=1, rel=0.02)
    assert theory.rank_power_keys(10 * n, a, missed) == theory.rank_power_keys(n, a, missed)


def test_ranks_stay_within_the_context():
    found = theory.rank_power_keys(100, torch.tensor([0.0, 0.999, 1.0, 1.001, 5.0]), 0.05)
    assert ((found >= 1) & (found <= 100)).all()


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
def test_cost_is_the_sum_over_rows(exponent):
    n, alpha = 50_000, 3.0
    rows = alpha * torch.arange(1, n + 1, dtype=torch.float64) ** exponent
    cost = theory.sparse_cost(n, alpha, exponent)
    assert cost.item() == pytest.approx(rows.sum().item(), rel=1e-3)
    torch.testing.assert_close(theory.cost_ratio(n, alpha, exponent), cost / (n**2 / 2))


def test_alpha_of_a_share_keeps_that_share():
    alpha = theory.alpha_for_share(0.1, 32768, 0.5)
    assert Budget(alpha=alpha.item(), exponent=0.5, floor=0)(32768) == math.ceil(0.1 * 32768)
    assert theory.alpha_for_share(1.0, 32768, 1.0) == 1


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("eco", [1291, 2048, 3251, 6502]),
        ("balanced", [1449, 2897, 5793, 16384]),
        ("safe", [1626, 4096, 10322, 41286]),
        ("near-lossless", [1824, 5925, 19248, 112722]),
    ],
)
def test_a_preset_requires_less_range_the_more_keys_it_keeps(preset, keys):
    found = Budget.preset(preset)(LENGTHS)
    assert found.tolist() == keys
    required = theory.required_logit_range(LENGTHS, found, 0.05)
    assert (required.diff() > 0).all()
    assert (required <= theory.required_logit_range(LENGTHS, 1024, 0.05)).all()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: theory.gaussian_keys_fraction(-1.0, 0.5), "sigma must"),
        (lambda: theory.gaussian_keys_fraction(1.0, 0.0), "missed must"),
        (lambda: theory.gamma(1.0, 1), "n must"),
        (lambda: theory.gamma_of_entropy(-0.1, 10), "entropy must"),
        (lambda: theory.rank_power_keys(10, -1.0, 0.5), "a must"),
        (lambda: theory.sparse_cost(10, 1.0, 1.5), "exponent must"),
        (lambda: theory.sparse_cost(10, 0.0, 0.5), "alpha must"),
        (lambda: theory.alpha_for_share(0.0, 10, 0.5), "share must"),
    ],
)
def test_arguments_out_of_range_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
