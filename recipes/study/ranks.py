"""Whether one quantity orders things as another does."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lit_sparse.recipes.study.stats import Estimate


def rank_correlation(x: ArrayLike, y: ArrayLike, seed: int = 0, draws: int = 1000) -> Estimate:
    """Spearman's: that of the ranks, with the percentile bootstrap interval over pairs.

    Args:
        x, y: [N] each, N at least 3; equal values share their mean rank.
    """
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    picks = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
    # A sample of a single pair, drawn again and again, has no order.
    found = [_correlation(a[pick], b[pick]) for pick in picks if len(set(pick.tolist())) > 2]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return Estimate(_correlation(a, b), float(low), float(high))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    a, b = (v - v.mean() for v in (_ranks(x), _ranks(y)))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
