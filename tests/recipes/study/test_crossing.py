import math

import numpy as np
import pytest

from lit_sparse.recipes.study.stats import crossing

GRID = (0.0, 1.0, 2.0, 3.0)


def test_where_a_share_passes_one_half():
    found = crossing(GRID, [[0, 0.2, 0.6, 1], [0, 0.4, 0.8, 1]])
    # The mean is .3 at 1 and .7 at 2; the repetitions alone pass at 1.75 and at 1.25.
    assert found.mean == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx((1.25, 1.75))


def test_a_share_that_never_passes_it():
    assert math.isnan(crossing(GRID, np.zeros((3, 4))).mean)
    assert math.isnan(crossing(GRID, np.ones((3, 4))).mean)
