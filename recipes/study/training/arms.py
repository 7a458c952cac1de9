"""What is compared: attention rules that execute equally many keys on the same training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lit_sparse.attention.plan import make_plan
from lit_sparse.budget import Budget

Row = Sequence[int]
"""Lengths of the documents of a packed row, in tokens."""


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        name: of its runs' directories.
        title: in tables and figures.
        budget: its law.
        score: of its selection; see `lit_sparse.attention.select`.
        executed: query-key pairs that the lists of the training rows hold, over those of dense
            attention.
    """

    name: str
    title: str
    budget: Budget
    executed: float
    score: str = "mass"

    def keys(self) -> dict[str, str]:
        """Of the config of its runs."""
        budget = {
            f"sparse_attention.budget.{key}": str(value)
            for key, value in self.budget.to_dict().items()
            if value is not None
        }
        return budget if self.score == "mass" else {**budget, "sparse_attention.score": self.score}


def arms(law: Budget, rows: Sequence[Row], block: int, tile: int) -> list[Arm]:
    """Dense attention, the law, the law without late slots and with other scorers, and rules of one
    size for all contexts that execute at least as many keys as the law, by less than a block.

    Args:
        law: alpha n^C with late slots.
        rows: those that are trained on.
        block, tile: of the selection.
    """
    dense = executed(Budget.dense(), rows, block, tile)

    def arm(name: str, title: str, budget: Budget, score: str = "mass") -> Arm:
        return Arm(name, title, budget, executed(budget, rows, block, tile) / dense, score)

    wanted = executed(law, rows, block, tile)

    def fixed(local: float) -> Budget:
        def rule(blocks: int) -> Budget:
            shares = {"sink": law.sink, "local": local, "late": law.late if local < 1 else 0.0}
            return Budget.fixed(blocks * block, **shares)

        longest = max(max(row) for row in rows)
        blocks = range(1, -(-longest // block) + 1)
        # The fewest that execute as many: monotone in the size.
        low, high = 0, len(blocks) - 1
        while low < high:
            middle = (low + high) // 2
            enough = executed(rule(blocks[middle]), rows, block, tile) >= wanted
            low, high = (low, middle) if enough else (middle + 1, high)
        return rule(blocks[low])

    power, window = fixed(law.local), fixed(1.0)
    return [
        arm("dense", "dense", Budget.dense()),
        arm("law", f"{law.alpha:g} n^{law.exponent:g}", law),
        arm("law-no-late", "the same, no late slots", replace(law, late=0.0)),
        arm("fixed", f"fixed k = {power(1 << 30)}", power),
        arm("sliding", f"sliding window, k = {window(1 << 30)}", window),
        arm("law-variance", "the law, scorer variance", law, "variance"),
        arm("law-exact", "the law, scorer exact", law, "exact"),
    ]


def executed(budget: Budget, rows: Sequence[Row], block: int, tile: int) -> int:
    """Query-key pairs of the blocks on all lists: what is computed, masked pairs included."""
    total = 0
    for row in rows:
        bounds = tuple(accumulate(row, initial=0))
        plan = make_plan(bounds, bounds, budget, block, tile)
        total += int((plan.lengths * plan.rows).sum()) * block
    return total
