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
    return mean_of(log_slopes(n, values), seed, draws)


def log_slopes(n: Sequence[float], values: ArrayLike) -> np.ndarray:
    """The slope of each repetition, [repetitions]; arguments as of `log_slope`."""
    x, y = np.log(np.asarray(n, dtype=np.float64)), np.log(np.asarray(values, dtype=np.float64))
    x = x - x.mean()
    return y @ x / (x @ x)


def crossing(
    grid: Sequence[float], shares: ArrayLike, level: float = 0.5, seed: int = 0, draws: int = 2000
) -> Estimate:
    """Where a share that rises along `grid` passes `level`, interpolated; NaN where it does not.

    Args:
        grid: ascending.
        shares: [repetitions, grid]; the interval is over repetitions.
    """
    data, x = np.asarray(shares, dtype=np.float64), np.asarray(grid, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    curves = np.concatenate([data.mean(0, keepdims=True), data[picks].mean(1)])
    curves = np.maximum.accumulate(curves, 1)
    found = [np.interp(level, curve, x, left=np.nan, right=np.nan) for curve in curves]
    if np.isnan(found[0]):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.nanpercentile(found[1:], [2.5, 97.5])
    return Estimate(float(found[0]), float(low), float(high))


def resampled_means(values: np.ndarray, seed: int = 0, draws: int = 1000) -> np.ndarray:
    """Bootstrap means over the last axis, [..., repetitions] -> [..., draws]: a repetition is drawn
    for everything else at once, as paired comparisons want it.
    """
    count = values.shape[-1]
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    weights = np.stack([np.bincount(pick, minlength=count) for pick in picks]) / count
    return np.asarray(values @ weights.T)
