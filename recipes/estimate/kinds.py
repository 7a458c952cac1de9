"""The kinds of attention layers that a model has in a curriculum stage."""

from __future__ import annotations

from typing import NamedTuple

from lit_sparse.budget import Budget


class Keeps(NamedTuple):
    """What a layer keeps: keys by a budget, or a sliding window of its own, in tokens."""

    budget: Budget
    window: int | None = None
