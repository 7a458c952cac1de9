"""Spread and trend of a few repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def mean_of(values: ArrayLike, seed: int = 0, draws: int = 2000) -> Estimate:
    """The mean of independent repetitions, and its percentile bootstrap interval.

    Args:
        values: [repetitions]; of pairs give the differences.
    """
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    low, high = np.percentile(data[picks].mean(1), [2.5, 97.5])
    return Estimate(float(data.mean()), float(low), float(high))


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


def resampled_means(values: np.ndarray, seed: int = 0, draws: int = 1000) -> np.ndarray:
    """Bootstrap means over the last axis, [..., repetitions] -> [..., draws]: a repetition is drawn
    for everything else at once, as paired comparisons want it.
    """
    count = values.shape[-1]
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    weights = np.stack([np.bincount(pick, minlength=count) for pick in picks]) / count
    return np.asarray(values @ weights.T)
