import numpy as np
import pytest

from lit_sparse.evaluation import mean_of, wilson


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Of the formula in Brown, Cai and DasGupta (Statistical Science 2001), section 3.1.1.
    [(0, 20, 0.0, 0.1611), (10, 20, 0.2993, 0.7007), (20, 20, 0.8389, 1.0), (1, 8, 0.0224, 0.4709)],
)
def test_wilson_s_interval(hits, count, low, high):
    found = wilson(hits, count)
    assert found.mean == hits / count
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert found.low <= found.mean <= found.high


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = mean_of(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.1)
