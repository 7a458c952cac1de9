"""Windows of equal cost against the constant one, over the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lit_sparse.recipes.study.stats import Estimate, resampled_means
from lit_sparse.recipes.study.windows.cost import CONSTANT, RULES

READINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"mean": np.mean, "worst": np.max}
"""Of the errors of all lengths: their mean, which is that over all tokens, since every length has
equally many; and that of the length which fares worst."""

_CONSTANT = RULES.index(CONSTANT)


@dataclass(frozen=True)
class Comparison:
    """All [costs, rules]; gains are the constant window's error less a rule's.

    Args:
        errors: of the rules.
        gain, low, high: with a 95 % bootstrap interval over rows, which are drawn for all rules at
            once.
    """

    errors: np.ndarray
    gain: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def won(self) -> np.ndarray:
        """Whether a rule errs less than the constant window, beyond chance."""
        return self.low > 0

    @property
    def lost(self) -> np.ndarray:
        return self.high < 0


def compare(values: np.ndarray, reading: str, seed: int = 0) -> Comparison:
    """Hold every rule against the constant window.

    Args:
        values: errors, [costs, rules, lengths, rows].
        reading: one of `READINGS`.
    """
    over_lengths = READINGS[reading]
    errors = over_lengths(values.mean(-1), 2)
    drawn = over_lengths(resampled_means(values, seed), 2)
    gains = drawn[:, [_CONSTANT]] - drawn
    low, high = np.percentile(gains, [2.5, 97.5], axis=-1)
    return Comparison(errors, errors[:, [_CONSTANT]] - errors, low, high)


def middle_cost(costs: Sequence[float]) -> int:
    """The number of the one that is looked at closer."""
    return (len(costs) - 1) // 2


def keys_ratio(
    values: np.ndarray, costs: Sequence[float], at: int, rule: int, reading: str, seed: int = 0
) -> Estimate:
    """How many times the keys of a rule the constant window needs for the same error.

    Its error is read off the costs that were measured, in between by straight lines over the
    logarithm of the cost; beyond them the answer is that of the first or the last.

    Args:
        values: errors, [costs, rules, lengths, rows].
        at: the rule's cost, its number.
    """
    over_lengths = READINGS[reading]
    errors = over_lengths(values.mean(-1), 2)[..., None]
    drawn = over_lengths(resampled_means(values, seed), 2)
    both = np.concatenate([errors, drawn], -1)
    # Errors fall as costs rise; np.interp wants them to rise.
    falling = np.minimum.accumulate(both[:, _CONSTANT], axis=0)[::-1]
    log_costs = np.log(costs)[::-1]
    needed = [
        np.exp(np.interp(error, curve, log_costs))
        for error, curve in zip(both[at, rule], falling.T, strict=True)
    ]
    ratios = np.array(needed) / costs[at]
    low, high = np.percentile(ratios[1:], [2.5, 97.5])
    return Estimate(float(ratios[0]), float(low), float(high))
