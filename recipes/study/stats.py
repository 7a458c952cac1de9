"""Spread and trend of a few repetitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lit_sparse.evaluation.intervals import Estimate, mean_of

__all__ = ["Estimate", "log_slope", "mean_of"]


def log_slope(n: Sequence[float], values: ArrayLike, seed: int = 0, draws: int = 2000) -> Estimate:
    """Slope of ln value over ln n, by least squares; the interval over repetitions.

    Args:
        n: [lengths], positive.
        values: positive, [repetitions, lengths]; a repetition is drawn whole.
    """
    x, y = np.log(np.asarray(n, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64))
    x = x - x.mean()
    return mean_of(y @ x / (x @ x), seed, draws)
