"""Intervals and correlations against cases that are known."""

import math

import numpy as np
import pytest

from lit_sparse.recipes.study.stats import crossing, rank_correlation

GRID = (0.0, 1.0, 2.0, 3.0)


def test_where_a_share_passes_one_half():
    found = crossing(GRID, [[0, 0.2, 0.6, 1], [0, 0.4, 0.8, 1]])
    # The mean is .3 at 1 and .7 at 2; the repetitions alone pass at 1.75 and at 1.25.
    assert found.mean == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx((1.25, 1.75))


def test_a_share_that_never_passes_it():
    assert math.isnan(crossing(GRID, np.zeros((3, 4))).mean)
    assert math.isnan(crossing(GRID, np.ones((3, 4))).mean)


def test_repetitions_that_pass_it_beyond_the_grid_widen_the_interval_to_its_end():
    found = crossing(GRID, [[0, 0, 0, 0.4], [0, 0.2, 0.6, 1], [0, 0.2, 0.6, 1]])
    # Draws of the first repetition alone do not pass it.
    assert (found.mean, found.high) == (pytest.approx(2 + 0.1 / 0.4), 3)
    assert found.low == pytest.approx(1.75)


def test_rank_correlation_knows_order_alone():
    x = np.arange(12.0)
    assert rank_correlation(x, x**3).mean == pytest.approx(1)
    assert rank_correlation(x, -np.exp(x)).high == pytest.approx(-1)


def test_rank_correlation_of_ties_is_that_of_mean_ranks():
    found = rank_correlation([1, 2, 2, 3], [1, 3, 2, 4])
    assert found.mean == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert found.low <= found.mean <= found.high


def test_what_is_unrelated_has_zero_in_its_interval():
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    found = rank_correlation(x, y)
    assert found.low < 0 < found.high


def test_pairs_of_one_head_are_no_more_certain_than_the_head():
    x, y = np.random.default_rng(0).normal(size=(2, 12))
    once = rank_correlation(x, y)
    # Ties share their mean rank, so ten copies of every head say what one says.
    copied = rank_correlation(*(np.repeat(v[:, None], 10, 1) for v in (x, y)))
    assert vars(copied) == pytest.approx(vars(once))
