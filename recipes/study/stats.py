"""Spread, trend and order of a few repetitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lit_sparse.evaluation.intervals import Estimate, mean_of

__all__ = [
    "Estimate",
    "crossing",
    "log_slope",
    "log_slopes",
    "mean_of",
    "rank_correlation",
    "resampled_means",
]


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
    if not curves[0, 0] <= level <= curves[0, -1]:
        return Estimate(np.nan, np.nan, np.nan)
    # A draw that passes it beyond the grid counts as its end.
    found = [float(np.interp(level, curve, x)) for curve in curves]
    low, high = np.percentile(found[1:], [2.5, 97.5])
    return Estimate(found[0], float(low), float(high))


def resampled_means(values: np.ndarray, seed: int = 0, draws: int = 1000) -> np.ndarray:
    """Bootstrap means over the last axis, [..., repetitions] -> [..., draws]: a repetition is drawn
    for everything else at once, as paired comparisons want it.
    """
    count = values.shape[-1]
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    weights = np.stack([np.bincount(pick, minlength=count) for pick in picks]) / count
    return np.asarray(values @ weights.T)


def rank_correlation(x: ArrayLike, y: ArrayLike, seed: int = 0, draws: int = 1000) -> Estimate:
    """Spearman's: that of the ranks, with the percentile bootstrap interval.

    Args:
        x, y: [N] or [N, pairs] each, N at least 3: what is drawn are the N, each with all its
            pairs. Equal values share their mean rank.
    """
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    picks = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
    # A sample of a single one, drawn again and again, has no order.
    found = [_correlation(a[pick], b[pick]) for pick in picks if len(set(pick.tolist())) > 2]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Estimate(_correlation(a, b), float(low), float(high))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (v - v.mean() for v in (_ranks(x.ravel()), _ranks(y.ravel())))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
