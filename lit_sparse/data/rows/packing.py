"""How runs of documents become rows: concatenate and cut, or best fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np

from lit_sparse.data.rows.epochs import Runs, Supply

POOL_PIECES = 2**17
"""Pieces that are held at once, about. It bounds the memory of the packing."""

POOL_ROWS = 2**14
"""Rows that best fit makes at once, at most."""

FULL = 1 / 256
"""A row is as good as full where no more than this part of it is free."""

WASTE = 1 / 32
"""Part of an epoch that may be left free for the sake of placing all its pieces."""

Rows = tuple[np.ndarray, Runs]
"""For every piece the number of its row, counted from 0 and ascending, and the pieces."""


def concatenate(supply: Supply, stage: int) -> Iterator[Rows]:
    """The rows of a stage, where the documents stand one after the other.

    Row r is the next `row_tokens` tokens. What stands of a document in a row is cut into pieces of
    the stage's length, the last one shorter. Rows are always full, and the row that is open when an
    epoch ends goes on with the next.
    """
    length, rows = supply.demand[stage].length, supply.demand[stage].rows
    row_tokens = supply.row_tokens
    supply.begin_stage(stage, grain=1)
    runs = supply.nothing
    while rows:
        if supply.empty:
            supply.begin_epoch()
        held = runs.tokens
        window = min(rows, max(1, POOL_PIECES * length // row_tokens)) * row_tokens
        runs = Runs.join(runs, supply.draw(window - held, POOL_PIECES, rows * row_tokens - held))
        segments = _cut_at_rows(runs, row_tokens)
        ends = np.cumsum(segments.lengths, dtype=np.int64)
        full = int(ends[-1]) // row_tokens
        done = int(np.searchsorted(ends, full * row_tokens, side="right"))
        runs = segments[done:]
        if full:
            pieces = segments[:done].cut(length)
            before = np.cumsum(pieces.lengths, dtype=np.int64) - pieces.lengths
            yield before // row_tokens, pieces
            rows -= full
    supply.give_back(runs)


def _cut_at_rows(runs: Runs, row_tokens: int) -> Runs:
    ends = np.cumsum(runs.lengths, dtype=np.int64)
    begins = ends - runs.lengths
    at = np.union1d(begins, np.arange(0, ends[-1], row_tokens))
    owner = np.searchsorted(begins, at, side="right") - 1
    return Runs(
        runs.documents[owner],
        runs.starts[owner] + (at - begins[owner]).astype(runs.starts.dtype),
        np.diff(np.append(at, ends[-1])).astype(runs.lengths.dtype),
        runs.late[owner],
    )


def fit(supply: Supply, stage: int) -> Iterator[Rows]:
    """The rows of a stage, where pieces are placed whole: no document that fits is cut.

    Documents longer than the stage's length become pieces of that length and a remainder (with
    `supply.truncate` only the first piece). A pool of pieces is packed by `best_fit`, its fullest
    rows are made, and the pieces of the others go back into the pool. Late rounds find short pieces
    left over, so the rows of as many rounds as memory holds come out mixed, in an order drawn from
    (seed, epoch, stage, round). An epoch ends with all its pieces placed, save those of its
    emptiest row: these come in the next epoch (in a store of few rows they may wait longer, until
    the room that they leave is small). Rows may have room left.

    Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, section 3.
    """
    length, rows = supply.demand[stage].length, supply.demand[stage].rows
    row_tokens = supply.row_tokens
    supply.begin_stage(stage, grain=length)
    pool, turn = supply.nothing, 0
    ready: list[Rows] = []
    ready_rows = 0
    while rows:
        if supply.empty:
            supply.begin_epoch()
        # A little more than the rows could hold, so that the last of them find pieces that fit.
        held, ahead = pool.tokens, (rows + 1 + rows // 32) * row_tokens
        window = min(ahead, POOL_ROWS * row_tokens, POOL_PIECES * length)
        if held < window and len(pool) < POOL_PIECES:
            drawn = supply.draw(window - held, POOL_PIECES - len(pool), ahead - held)
            pool = Runs.join(pool, drawn.cut(length))
        pool = pool[np.argsort(-pool.lengths.astype(np.int64), kind="stable")]
        row, made = best_fit(pool.lengths, row_tokens)
        room = row_tokens - np.bincount(row, pool.lengths, minlength=made).astype(np.int64)

        rng = np.random.default_rng((supply.seed, supply.epoch, stage, turn))
        turn += 1
        fullest = rng.permutation(made)
        fullest = fullest[np.argsort(room[fullest], kind="stable")]
        if supply.empty:
            emptiest = fullest[-1]
            free = WASTE * supply.total if pool.late[row == emptiest].any() else 0
            carried = room[emptiest] > free
            out = made - int(carried)
        else:
            out = max(-(-made // 2), int(np.count_nonzero(room <= FULL * row_tokens)))
        out = min(out, rows)
        rows -= out
        number = np.full(made, -1)
        number[fullest[:out]] = ready_rows + np.arange(out)
        number = number[row]
        ready.append((number[number >= 0], pool[number >= 0]))
        ready_rows += out
        pool = pool[number < 0]
        if supply.empty and rows:
            pool.late[:] = True
        if not rows or supply.empty or sum(len(pieces) for _, pieces in ready) >= POOL_PIECES:
            if ready_rows:
                yield _mixed(ready, rng.permutation(ready_rows))
            ready, ready_rows = [], 0
    supply.give_back(pool)


def _mixed(parts: list[Rows], place: np.ndarray) -> Rows:
    """The rows of all parts, numbered through, where row r comes to `place[r]`."""
    row = place[np.concatenate([numbers for numbers, _ in parts])]
    order = np.argsort(row, kind="stable")
    return row[order], Runs.join(*(pieces for _, pieces in parts))[order]


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: every piece, longest first, goes to the fullest row that has room.

    Equal pieces and rows of equal room are handled together, so the work grows with the number of
    different sizes rather than with the pieces.

    Args:
        lengths: tokens of each piece [pieces], not rising, each in [1, capacity].
        capacity: tokens that a row holds.

    Returns:
        Row of each piece, int64 [pieces], and the number of rows.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    rooms: list[int] = []  # ascending, each once
    held: dict[int, list[tuple[int, int]]] = {}  # room -> runs of rows: the first, how many
    made = 0
    each: list[int] = []  # pieces that a row of the run takes
    first: list[int] = []
    number: list[int] = []

    def put(room: int, row: int, rows: int) -> None:
        if not room or not rows:
            return
        if room not in held:
            rooms.insert(bisect_left(rooms, room), room)
            held[room] = []
        held[room].append((row, rows))

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            tightest = bisect_left(rooms, size)
            if tightest == len(rooms):
                row, rows, room = made, -(-count // (capacity // size)), capacity
                made += rows
            else:
                room = rooms[tightest]
                row, rows = held[room].pop()
                if not held[room]:
                    del held[room], rooms[tightest]
            taken = min(room // size, count)
            used = min(rows, count // taken)
            put(room, row + used, rows - used)
            put(room - taken * size, row, used)
            each.append(taken)
            first.append(row)
            number.append(used)
            count -= taken * used
    per_row = np.array(each, dtype=np.int64)
    pieces = per_row * np.array(number, dtype=np.int64)
    within = np.arange(len(lengths)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    row_of = np.repeat(np.array(first, dtype=np.int64), pieces)
    return row_of + within // np.repeat(per_row, pieces), made


PACKINGS: dict[str, Callable[[Supply, int], Iterator[Rows]]] = {
    "best_fit": fit,
    "concat": concatenate,
}
