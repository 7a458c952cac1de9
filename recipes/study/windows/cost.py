"""Windows at equal cost: what a law costs on a mixture of lengths, and the scale that costs so
much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lit_sparse.attention.plan import late_rows, make_plan
from lit_sparse.budget import Budget


@dataclass(frozen=True)
class Rule:
    """A form of the window, whose scale is free.

    Args:
        name: of tables and legends.
        make: the budget of a scale; its keyword arguments are those of `Budget`.
        exponent: C; None for the logarithm.
    """

    name: str
    make: Callable[..., Budget]
    exponent: float | None


def _power(name: str, exponent: float) -> Rule:
    def make(scale: float, **others: object) -> Budget:
        return Budget(scale, exponent, **{"floor": 0, **others})  # type: ignore[arg-type]

    return Rule(name, make, exponent)


CONSTANT = _power("constant", 0.0)
ADAPTIVE = _power("n^.5", 0.5)
"""The law whose exponent is the default of `Budget`."""

RULES = (
    CONSTANT,
    Rule("log n", Budget.log, None),
    _power("n^.25", 0.25),
    ADAPTIVE,
    _power("n^.75", 0.75),
    _power("proportional", 1.0),
)


def mean_keys(budget: Budget, documents: Sequence[int]) -> float:
    """The mean of k(n) over all query positions of the documents: every token counts once."""
    contexts = torch.arange(1, max(documents) + 1)
    # Documents that reach each context.
    ends = torch.tensor(sorted(documents))
    queries = len(ends) - torch.searchsorted(ends, contexts)
    return int((budget(contexts) * queries).sum()) / int(queries.sum())


def executed_keys(budget: Budget, documents: Sequence[int], block: int, tile: int) -> float:
    """The same for the keys that the operator reads: whole blocks, lists that a tile shares, and
    what is always kept.

    From lengths alone, so every late slot is taken as used; where rows pick the same block it
    stays empty, and the operator reads fewer.
    """
    bounds = (0, *np.cumsum(documents).tolist())
    plan = make_plan(bounds, bounds, budget, block, tile)
    rows = plan.rows
    read = rows * (plan.full * block + plan.start - plan.complete * block) + rows * (rows + 1) // 2
    for late in np.unique(plan.late).tolist():
        own = plan.late == late
        for entry in late_rows(late, tile) if late else []:
            read[own] += block * np.maximum(rows[own] - entry, 0)
    return float(read.sum() / bounds[-1])


def solve(rule: Rule, cost: Callable[[Budget], float], target: float, **others: object) -> Budget:
    """The budget of a rule whose cost is nearest to the target, in keys.

    Args:
        cost: of a budget; must not fall with its scale.
        others: arguments of `Budget`.
    """
    low, high = 0.0, 1.0
    while cost(rule.make(high, **others)) < target:
        if high > target * 2**20:
            raise ValueError(f"no window costs {target:g} keys: the documents are too short")
        low, high = high, 2 * high
    # Not for ever where the least window, what is always kept, costs as much already.
    while high - low > 1e-6 * high and high > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(rule.make(middle, **others)) < target else (low, middle)
    both = [rule.make(scale, **others) for scale in (low, high) if scale > 0]
    return min(both, key=lambda budget: abs(cost(budget) - target))
