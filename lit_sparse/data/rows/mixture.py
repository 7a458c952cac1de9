"""Mixtures: which store each row of the run comes from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cached_property
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
    """The store of every row, so even that no store is ever a row away from its share.

    After every row, the rows of each store differ from the sum of its weights so far by less than
    one, through changes of the weights too; a store without weight in a stage gets no row there.

    The j-th turn of a store (from 0) may come when the sum of its weights has passed j + d, and
    must have come when it reaches j + 1 - d; of the turns that may come, the one with the first
    deadline does. With any d <= 1 / (2k - 2) for k stores such a schedule exists (R. Tijdeman, "The
    chairman assignment problem", Discrete Mathematics 32 (1980), 323-330), and the first deadline
    finds it, as turns and rows are unit jobs with release times. Where weights are zero in some
    stages only, a turn may have to wait for a later stage; then d is next to 0, and turns taken
    before make room along an alternating path where the first deadline alone would fail.

    Args:
        weights: share of each store in each stage [stages, stores]; every stage sums to 1.
        rows: rows of each stage [stages].

    Returns:
        uint16 [rows of all stages].

    Raises:
        ValueError: the weights of a stage are negative, or do not sum to 1.
    """
    weights, rows = np.asarray(weights, dtype=np.float64), np.asarray(rows, dtype=np.int64)
    if (weights < 0).any() or not np.allclose(weights.sum(axis=1), 1):
        raise ValueError(
            f"the weights of a stage must be >= 0 and sum to 1, got {weights.tolist()}"
        )
    ends = np.concatenate([[0], np.cumsum(rows)])
    if weights.shape[1] == 1:
        return np.zeros(ends[-1], dtype=np.uint16)
    turns = _Turns(weights, ends)
    order = np.argsort(turns.first, kind="stable")
    arrivals = np.bincount(turns.first, minlength=ends[-1])
    # One number at a time, these are several times faster than the arrays that they show.
    store_of, last = turns.store.data, turns.last.data
    turn_of, row_of = turns.turn_of.data, turns.row_of.data
    ready: list[int] = []
    begun = 0
    for stage in range(len(weights)):
        without = set(np.flatnonzero(weights[stage] <= 0).tolist())
        waiting: list[int] = []
        for begin in range(ends[stage], ends[stage + 1], BLOCK):
            arriving = arrivals[begin : min(begin + BLOCK, ends[stage + 1])]
            new = iter(order[begun : begun + int(arriving.sum())].tolist())
            begun += int(arriving.sum())
            for row, count in enumerate(arriving.tolist(), begin):
                for _ in range(count):
                    heappush(ready, next(new))
                while without and ready and store_of[ready[0]] in without:
                    waiting.append(heappop(ready))
                if ready:
                    turn_of[row] = turn = heappop(ready)
                    row_of[turn] = row
                else:
                    waiting.remove(turns.fill(row))
                while ready and last[ready[0]] <= row:
                    heappush(ready, turns.squeeze_in(heappop(ready), row))
        for turn in waiting:
            heappush(ready, turn)
    return turns.store[turns.turn_of]


class _Turns:
    """The turns of all stores, sorted by deadline, and which row has which of them.

    Args:
        weights: float64 [stages, stores].
        ends: int64 [stages + 1], 0 and the first row after each stage.
    """

    def __init__(self, weights: np.ndarray, ends: np.ndarray) -> None:
        stages, stores = weights.shape
        self.weights, self.ends = weights, ends
        # Without gaps any margin up to the theorem's will do. With gaps, what the margins cut away
        # must stay under one row in all, and the rounding of the sums under the margin.
        margin = 1 / (2 * stores) if (weights > 0).all() else 1e-8
        columns = []
        for number in range(stores):
            share = weights[:, number]
            target = np.concatenate([[0], np.cumsum(share * np.diff(ends))])
            turn = np.arange(math.ceil(target[-1]))
            window = []
            for amounts in (turn + margin, turn + 1 - margin):
                stage = np.minimum(np.searchsorted(target[1:], amounts), stages - 1)
                with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                    after = (amounts - target[stage]) / share[stage]
                row = ends[stage] + np.ceil(after) - 1
                window.append(np.where(amounts <= target[-1], row, ends[-1]).astype(np.int64))
            columns.append((*window, np.full(len(turn), number, dtype=np.uint16)))
        first, last, store = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(last, kind="stable")
        order = order[first[order] < ends[-1]]
        self.first, self.last, self.store = first[order], last[order], store[order]
        self.turn_of = np.zeros(ends[-1], dtype=np.int64)
        """Turn of each row."""
        self.row_of = np.full(len(order), -1)
        """Row of each turn, -1: none yet."""

    def take(self, turn: int, row: int) -> None:
        self.turn_of[row] = turn
        self.row_of[turn] = row

    def fill(self, row: int) -> int:
        """Give a turn to a row for which all that may come is taken; returns the turn used up.

        The row takes over the turn of an earlier row, that row the turn of another, until one finds
        a turn that is still free.
        """
        wanted_by: dict[int, int] = {}
        rows = deque([row])
        while rows:
            wanting = rows.popleft()
            for turn in self._turns_for(wanting):
                if turn in wanted_by:
                    continue
                wanted_by[turn] = wanting
                if self.row_of[turn] >= 0:
                    rows.append(int(self.row_of[turn]))
                    continue
                free = turn
                while True:
                    at = wanted_by[turn]
                    handed_on = int(self.turn_of[at])
                    self.take(turn, at)
                    if at == row:
                        return free
                    turn = handed_on
        raise RuntimeError(f"no even schedule was found for the weights {self.weights.tolist()}")

    def squeeze_in(self, due: int, row: int) -> int:
        """Find a row up to `row` for a turn that must have come by then; returns what it displaces.

        The turn takes over the row of another, that turn the row of a third, until one can wait.
        """
        wanted_by: dict[int, int] = {}
        turns = deque([due])
        while turns:
            wanting = turns.popleft()
            for at in self._rows_for(wanting, row):
                if at in wanted_by:
                    continue
                wanted_by[at] = wanting
                held = int(self.turn_of[at])
                if self.last[held] <= row:
                    turns.append(held)
                    continue
                self.row_of[held] = -1
                while True:
                    turn = wanted_by[at]
                    handed_on = int(self.row_of[turn])
                    self.take(turn, at)
                    if turn == due:
                        return held
                    at = handed_on
        raise RuntimeError(f"no even schedule was found for the weights {self.weights.tolist()}")

    @cached_property
    def _by_store(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Turns of each store, their first rows and their last."""
        turns = [np.flatnonzero(self.store == store) for store in range(self.weights.shape[1])]
        return [(at, self.first[at], self.last[at]) for at in turns]

    def _turns_for(self, row: int) -> Iterator[int]:
        stage = np.searchsorted(self.ends, row, side="right") - 1
        for store in np.flatnonzero(self.weights[stage]):
            turns, first, last = self._by_store[store]
            begin, end = np.searchsorted(last, row), np.searchsorted(first, row, side="right")
            yield from turns[begin:end].tolist()

    def _rows_for(self, turn: int, row: int) -> Iterator[int]:
        first, last = int(self.first[turn]), min(int(self.last[turn]), row)
        for stage in np.flatnonzero(self.weights[:, self.store[turn]]).tolist():
            begin, end = int(self.ends[stage]), int(self.ends[stage + 1])
            yield from range(max(first, begin), min(last + 1, end))
