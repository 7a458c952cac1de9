"""Mixtures: which store each row of the run comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from heapq import heappop, heappush

import numpy as np

BLOCK = 2**16
"""Rows whose candidates are lists of Python numbers at once."""


def check_weights(mapping: Mapping[str, float], where: str) -> dict[str, float]:
    """Weights of stores, normalised to a sum of 1, in the order given.

    Args:
        mapping: store -> weight; 0 is allowed, but not for all.
        where: key of the configuration, for messages.

    Raises:
        ValueError: no store, a weight that is negative or no finite number, or no positive weight.
    """
    if not mapping:
        raise ValueError(f"{where} is empty: give at least one store with its weight")
    for store, weight in mapping.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{where}[{store!r}] must be a number >= 0, got {weight!r}")
    total = math.fsum(mapping.values())
    if not total:
        raise ValueError(
            f"{where}: all weights are 0; one at least must be positive: {dict(mapping)}"
        )
    return {store: weight / total for store, weight in mapping.items()}


def schedule(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The store of every row, as even as it can be.

    After every row, the rows of each store differ from the sum of its weights so far by less than
    one, through changes of the weights too; a store without weight gets no row.

    The j-th row of a store (from 0) may come once the target has passed j + d, and must have come
    when it passes j + 1 - d; of the rows that may come, the one with the first deadline does. With
    any d <= 1 / (2k - 2) for k stores such a schedule exists: R. Tijdeman, "The chairman assignment
    problem", Discrete Mathematics 32 (1980), 323-330.

    Args:
        weights: share of each store in each stage [stages, stores]; every stage sums to 1.
        rows: rows of each stage [stages].

    Returns:
        uint16 [rows of all stages].
    """
    weights, rows = np.asarray(weights, dtype=np.float64), np.asarray(rows, dtype=np.int64)
    stages, stores = weights.shape
    ends = np.concatenate([[0], np.cumsum(rows)])
    if stores == 1:
        return np.zeros(ends[-1], dtype=np.uint16)
    released, key = _windows(weights, ends)
    arrivals = np.bincount(released, minlength=ends[-1] + 1)
    out = np.empty(ends[-1], dtype=np.uint16)
    ready: list[int] = []
    taken = 0
    for stage in range(stages):
        without = {store for store in range(stores) if not weights[stage, store]}
        waiting: list[int] = []
        for first in range(ends[stage], ends[stage + 1], BLOCK):
            arriving = arrivals[first : min(first + BLOCK, ends[stage + 1])]
            new = iter(key[taken : taken + int(arriving.sum())].tolist())
            taken += int(arriving.sum())
            chosen = []
            for count in arriving.tolist():
                for _ in range(count):
                    heappush(ready, next(new))
                while without and ready and ready[0] % stores in without:
                    waiting.append(heappop(ready))
                chosen.append(heappop(ready) % stores)
            out[first : first + len(chosen)] = chosen
        for row in waiting:
            heappush(ready, row)
    return out


def _windows(weights: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When each row of each store may come, and `deadline * stores + store`; by the former."""
    stages, stores = weights.shape
    margin = 1 / (2 * stores)
    released, key = [], []
    for store in range(stores):
        share = weights[:, store]
        target = np.concatenate([[0], np.cumsum(share * np.diff(ends))])
        steps = np.arange(math.ceil(target[-1] + 1))
        at = []
        for amounts in (steps + margin, steps + 1 - margin):
            stage = np.minimum(np.searchsorted(target[1:], amounts), stages - 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                after = (amounts - target[stage]) / share[stage]
            # Rounding must not move what a row reaches exactly into the next row.
            row = ends[stage] + np.ceil(after - 1e-6) - 1
            at.append(np.where(amounts <= target[-1], row, ends[-1]).astype(np.int64))
        released.append(at[0])
        key.append(at[1] * stores + store)
    begin, order_key = np.concatenate(released), np.concatenate(key)
    order = np.lexsort((order_key, begin))
    order = order[: np.count_nonzero(begin < ends[-1])]
    return begin[order], order_key[order]
