"""Tokens that break an assumption break that one."""

import math

import pytest
import torch

from lit_sparse.recipes.study import relaxed

N, ENTRIES = 20000, 8


def _draw(tokens, n=N, entries=ENTRIES):
    return tokens(n, entries, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rho", [0.5, 0.99])
def test_neighbours_are_those_of_the_recursion(rho):
    drawn = _draw(relaxed.correlated(rho), 50, 3)
    own = _draw(relaxed.rademacher, 50, 3)
    expected = own[:1]
    for row in own[1:]:
        following = rho * expected[-1] + (1 - rho**2) ** 0.5 * row
        expected = torch.cat([expected, following[None]])
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_neighbours_are_correlated():
    x = _draw(relaxed.correlated(0.9))
    assert x.square().mean().item() == pytest.approx(1, abs=0.05)
    assert (x[:-1] * x[1:]).mean().item() == pytest.approx(0.9, abs=0.05)


def test_shares_of_the_mean_square():
    x = _draw(relaxed.shared_mean(0.6))
    assert x.mean(0).square().mean().item() == pytest.approx(0.6, abs=0.03)
    assert _draw(relaxed.topics(0.6)).square().mean().item() == pytest.approx(1, abs=0.1)
    assert len(_draw(relaxed.topics(1.0), entries=64).unique(dim=0)) == relaxed.TOPICS


@pytest.mark.parametrize("df", [math.inf, 5.0])
def test_heavy_tails_have_the_quantiles_of_student_t(df):
    x = _draw(relaxed.heavy(df)).flatten()
    # Of tables, 0.7267 and 4.0321 for df = 5, over the standard deviation sqrt(5 / 3).
    expected = {math.inf: (0.6745, 2.5758), 5.0: (0.5629, 3.1232)}[df]
    found = torch.quantile(x[: 2**17].abs(), torch.tensor([0.5, 0.99]))
    assert found.tolist() == pytest.approx(expected, rel=0.05)


def test_outliers_and_repetitions():
    x = _draw(relaxed.outliers(10), entries=relaxed.D_MODEL)
    scales = x.square().mean(0).sqrt()
    assert (scales[: relaxed.OUTLIERS] / scales[-1]).tolist() == pytest.approx([10] * 4)
    assert x.square().mean().item() == pytest.approx(1)
    assert len(_draw(relaxed.repeated(32), entries=64).unique(dim=0)) == 32
