"""The Pareto front of laws: the least error at each cost."""

from __future__ import annotations

import numpy as np


def front(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Numbers of the laws that none beats in both: costs ascend along them, errors fall.

    Args:
        costs, errors: float64 [laws].
    """
    order = np.lexsort((errors, costs))
    best = np.minimum.accumulate(errors[order])
    improves = np.concatenate([[True], best[1:] < best[:-1]])
    return np.asarray(order[improves])


def front_error(costs: np.ndarray, errors: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The front's error at other costs: [asked].

    Between two laws it is a straight line over the logarithm of the cost. Where a law costs more
    than all of the front it is the error of the last; where it costs less, that of the first, which
    is less than the front would have there.
    """
    which = front(costs, errors)
    return np.asarray(np.interp(np.log(at), np.log(costs[which]), errors[which]))


def distances(
    costs: np.ndarray, errors: np.ndarray, own_costs: np.ndarray, own_errors: np.ndarray
) -> np.ndarray:
    """How far laws lie above the front of others, at equal cost; negative: below it.

    Args:
        costs: [laws].
        errors: [laws, draws]: the front of each draw is its own.
        own_costs: [own].
        own_errors: [own, draws].

    Returns:
        [own, draws]
    """
    fronts = [front_error(costs, drawn, own_costs) for drawn in errors.T]
    return np.asarray(own_errors - np.stack(fronts, axis=1))
