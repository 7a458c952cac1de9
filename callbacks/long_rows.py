"""Collapse that only very long sequences have, or that began with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_sparse.callbacks.alerts import Persistence
from lit_sparse.callbacks.sampled import log2_bucket

APART = 0.1
"""Least difference between what is compared: of ratios in [0, 1]."""

_LEAST_ROWS = 4


class LongRows:
    """Holds the longest rows of a head against its shorter ones, and against those before a longer
    stage.

    The longest rows see more than the largest power of two that a few rows (4) of one measurement
    have seen more than so far: a single long row starts no stage. Shorter ones see half of it at
    most. A head is past the limit if for `patience` measurements its longest rows are below it, and
    either shorter rows are not, by `APART` or more, and the longest were not at first; or the
    longest rows before the contexts grew were not, and they have been since.

    Args:
        limit: of a ratio in [0, 1] that is 0 in a collapse.
        patience: measurements on end.
    """

    def __init__(self, limit: float, patience: int) -> None:
        self.limit = limit
        self._persistence = Persistence(patience)
        self._longest: dict[int, int] = {}
        self._since: dict[int, int] = {}
        self._last: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}

    def add(self, layer: int, context: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """context int64 [R], near [R, H], of one measurement -> bool [H], where a head collapses at
        length by now, and [H], `near` of its longest rows.
        """
        nowhere = torch.zeros(near.shape[1], dtype=torch.bool)
        if len(near) < _LEAST_ROWS:
            return nowhere, near.double().mean(0)
        # The last row of a document of 2^i tokens belongs to the rows before it.
        bucket = log2_bucket((context - 1).clamp(min=1))
        longest = int(bucket.sort(descending=True).values[:_LEAST_ROWS][-1])
        if longest > self._longest.get(layer, 0):
            if layer in self._last:
                self._before[layer] = self._last[layer]
            self._longest[layer], self._since[layer] = longest, 0
        rows = near[bucket >= self._longest[layer]].double()
        value = rows.mean(0)
        if len(rows) < _LEAST_ROWS:
            return nowhere, value
        self._last[layer] = value
        self._since[layer] += 1

        past, shorter = value < self.limit, near[bucket <= self._longest[layer] // 4].double()
        alone = past & (shorter.mean(0) - value >= APART)
        if len(shorter) < _LEAST_ROWS:
            alone = nowhere
        collapsed = self._persistence.add(f"alone {layer}", value, alone, -APART)
        began = self._persistence.add(f"all {layer}", value, past, None)
        if layer in self._before:
            began &= self._persistence.held(f"all {layer}") == self._since[layer]
            collapsed |= began & (self._before[layer] - value >= APART)
        return collapsed, value

    def state_dict(self) -> dict[str, Any]:
        return {
            "persistence": self._persistence.state_dict(),
            "longest": self._longest,
            "since": self._since,
            "last": self._last,
            "before": self._before,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._persistence.load_state_dict(state_dict["persistence"])
        self._longest, self._since = dict(state_dict["longest"]), dict(state_dict["since"])
        self._last, self._before = dict(state_dict["last"]), dict(state_dict["before"])
