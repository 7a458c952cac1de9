"""Spread of what was measured on a few documents or prompts: 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_Z = 1.959964
"""The normal distribution's quantile of 0.975."""


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


def wilson(hits: int, count: int) -> Estimate:
    """A share of independent trials, and its score interval (Wilson, JASA 1927), which holds for
    few trials and for shares of 0 and 1 as well.
    """
    share, z2 = hits / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # Exact ends: rounding must not put a share of 0 or 1 outside of its own interval.
    low = 0.0 if hits == 0 else middle - half
    return Estimate(share, low, 1.0 if hits == count else middle + half)
