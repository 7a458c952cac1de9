"""The supply of documents: epoch after epoch, shuffled, the long ones kept for the long stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class Demand:
    """What one stage asks of one store.

    Args:
        length: longest piece of a document, in tokens.
        rows: rows of the stage; may be 0.
    """

    length: int
    rows: int


@dataclass
class Runs:
    """Runs of tokens of documents, as columns of equal size.

    Args:
        documents: number of the document.
        starts: first token, counted in the document.
        lengths: tokens.
        late: whether the run was carried over from the epoch before.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    late: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (getattr(self, column.name) for column in fields(self))

    def __getitem__(self, at: slice | np.ndarray) -> Runs:
        return Runs(*(column[at] for column in self))

    @classmethod
    def join(cls, *parts: Runs) -> Runs:
        """One after the other; not a copy if only one part holds anything."""
        held = [part for part in parts if len(part)] or list(parts[:1])
        if len(held) == 1:
            return held[0]
        return cls(*(np.concatenate(columns) for columns in zip(*held, strict=True)))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def cut(self, length: int) -> Runs:
        """Every run as pieces of `length` tokens and, last, what remains of it."""
        lengths = self.lengths.astype(np.int64)
        count = -(-lengths // length)
        whole = np.repeat(np.arange(len(self)), count)
        before = (np.arange(len(whole)) - np.repeat(np.cumsum(count) - count, count)) * length
        return Runs(
            self.documents[whole],
            self.starts[whole] + before.astype(self.starts.dtype),
            np.minimum(lengths[whole] - before, length).astype(self.lengths.dtype),
            self.late[whole],
        )

    def merged(self) -> Runs:
        """Runs of a document that follow each other, as one; in the order of the documents."""
        if not len(self):
            return self
        runs = self[np.lexsort((self.starts, self.documents, self.late))]
        follows = (
            (runs.documents[1:] == runs.documents[:-1])
            & (runs.starts[1:] == runs.starts[:-1] + runs.lengths[:-1])
            & (runs.late[1:] == runs.late[:-1])
        )
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        lengths = np.add.reduceat(runs.lengths, first, dtype=runs.lengths.dtype)
        return Runs(runs.documents[first], runs.starts[first], lengths, runs.late[first])


def longest(sizes: np.ndarray, tokens: int, cover: bool) -> np.ndarray:
    """Numbers of the largest sizes that make up `tokens`, found without sorting.

    Args:
        sizes: whole numbers >= 0, of a memory's size at most: they are counted.
        tokens: what they make up, or less where there is not as much.
        cover: whether to pass `tokens`, rather than to stay below.
    """
    held = np.bincount(sizes, minlength=1) * np.arange(int(sizes.max(initial=0)) + 1)
    # In sizes of at least each, and the smallest size that is taken whole.
    above = np.append(np.cumsum(held[::-1])[::-1], 0)
    size = max(1, int(np.searchsorted(-above, -tokens)))
    chosen = np.flatnonzero(sizes >= size)
    if cover and size > 1:
        some = -(-(tokens - int(above[size])) // (size - 1))
        chosen = np.append(chosen, np.flatnonzero(sizes == size - 1)[:some])
    return chosen


class Supply:
    """Hands out the documents of one epoch after the other.

    The order of epoch e is a permutation drawn from `default_rng((seed, e))`. With `prefer_long`
    the stages that this epoch will still serve choose from what is left of it, the longest first:
    documents at least as long as the stage's pieces, in shuffled order, until it has its tokens,
    and if there are not enough, the longest of the rest. They choose again whenever a stage begins,
    since a packing that leaves room takes fewer tokens than its rows could hold. With `truncate`
    the stage at work takes what longer ones leave as it comes: it would lose the ends of the rest.

    Args:
        lengths: tokens of each document of the store.
        documents: numbers of the documents to use; empty ones are left out.
        demand: the stages in order.
        row_tokens: tokens of a row.
        seed: not negative.
        prefer_long: whether stages choose; if not, they take the documents as they come.
        truncate: a document gives only as many tokens as a piece of the stage may have.
        upsample: `(longer_than, times)`: documents of at least `longer_than` tokens stand `times`
            as often in an epoch as others; a fraction is drawn document by document.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        documents: np.ndarray,
        demand: Sequence[Demand],
        row_tokens: int,
        *,
        seed: int,
        prefer_long: bool,
        truncate: bool,
        upsample: tuple[int, float] | None,
    ) -> None:
        self.lengths, self.demand, self.row_tokens = lengths, demand, row_tokens
        self.seed, self.prefer_long, self.truncate = seed, prefer_long, truncate
        self.upsample = upsample
        used = lengths[documents]
        # Four bytes a number are enough for any store that we have heard of.
        large = max(len(lengths), int(used.max(initial=0))) >= 2**32
        self.dtype = np.dtype(np.int64 if large else np.uint32)
        self.documents = documents[used > 0].astype(self.dtype)
        self.epoch = -1
        self.total = 0
        """Tokens of the epoch, as it began."""
        self.nothing = self._runs(self.documents[:0])
        """No runs, in columns of this supply's types."""
        # What is left of the epoch, in order; the numbers therein of what the current stage reads,
        # and how many of these it has read.
        self._left, self._mine, self._at = self.nothing, self.nothing.documents, 0
        self._stage, self._grain = 0, 1

    @property
    def empty(self) -> bool:
        """Whether the epoch is used up."""
        return self._at == len(self._left)

    @property
    def epochs(self) -> float:
        """Epochs that were used up when the last stage ended."""
        return self.epoch + 1 - self._left.tokens / max(self.total, 1)

    def begin_epoch(self) -> None:
        """Shuffle the documents anew; the epoch before must be used up."""
        self.epoch += 1
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.documents)
        if self.upsample is not None:
            longer_than, times = self.upsample
            extra = np.floor(times - 1 + rng.random(len(order))).astype(np.int64)
            extra[self.lengths[order] < longer_than] = 0
            order = rng.permutation(np.repeat(order, extra + 1)) if extra.any() else order
        self._left, self._mine, self._at = self._runs(order), self.nothing.documents, 0
        self.total = self._left.tokens

    def begin_stage(self, stage: int, grain: int) -> None:
        """From here on runs go to `stage`, divided at multiples of `grain` tokens only."""
        self._stage, self._grain = stage, grain

    def draw(self, tokens: int, most: int, ahead: int) -> Runs:
        """The next runs of the epoch: `tokens` tokens if they are there, of at most `most` runs.

        The last run may hold more than is missing, and is then divided: as much of it as is
        missing, rounded up to the grain, goes out. `ahead` tells how many tokens the stage still
        needs.
        """
        if self._at == len(self._mine):
            self._choose(ahead)
        numbers = self._mine[self._at : self._at + most]
        mine = self._left[numbers]
        if self.truncate:
            length = self.demand[self._stage].length
            mine = replace(mine, lengths=np.minimum(mine.lengths, self.dtype.type(length)))
        ends = np.cumsum(mine.lengths, dtype=np.int64)
        last = int(np.searchsorted(ends, tokens))
        if last == len(mine):
            self._at += last
            return mine
        runs, whole = mine[: last + 1], int(mine.lengths[last])
        part = tokens - (int(ends[last]) - whole)
        part = -(-part // self._grain) * self._grain
        if self.truncate or part >= whole:
            self._at += last + 1
        else:
            self._at += last
            runs.lengths[last] = part
            self._left.starts[numbers[last]] += self.dtype.type(part)
            self._left.lengths[numbers[last]] -= self.dtype.type(part)
        return runs

    def give_back(self, runs: Runs) -> None:
        """End a stage: what it drew and did not use, and what it did not draw, is for others."""
        runs = runs.merged()
        if self.truncate:
            runs = replace(runs, lengths=self._lengths(runs.documents))
        self._forget()
        self._left = Runs.join(runs, self._left)

    def _runs(self, documents: np.ndarray) -> Runs:
        starts = np.zeros(len(documents), self.dtype)
        late = np.zeros(len(documents), bool)
        return Runs(documents, starts, self._lengths(documents), late)

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        return self.lengths[documents].astype(self.dtype)

    def _choose(self, ahead: int) -> None:
        """Set apart what the current stage reads next: `ahead` tokens or more, if they are left."""
        self._forget()
        runs = self._left
        free = np.ones(len(runs), bool)
        if self.prefer_long:
            quotas, left = {self._stage: ahead}, runs.tokens - ahead
            for i in range(self._stage + 1, len(self.demand)):
                quotas[i] = max(0, min(self.demand[i].rows * self.row_tokens, left))
                left -= quotas[i]
            by_length = sorted(quotas, key=lambda i: (-self.demand[i].length, i))
            for i in by_length[: by_length.index(self._stage)]:
                free[self._longest(runs.lengths, free, i, quotas[i])] = False
            if not self.truncate:
                chosen = self._longest(runs.lengths, free, self._stage, ahead)
                free = np.zeros(len(runs), bool)
                free[chosen] = True
        if not free.any():
            free[:] = True
        self._mine = np.flatnonzero(free).astype(self.dtype)

    def _forget(self) -> None:
        """Drop the runs that were handed out."""
        if self._at:
            left = np.ones(len(self._left), bool)
            left[self._mine[: self._at]] = False
            self._left = self._left[left]
        self._mine, self._at = self.nothing.documents, 0

    def _longest(self, lengths: np.ndarray, free: np.ndarray, stage: int, quota: int) -> np.ndarray:
        """Numbers of the free runs, long ones first, that make up `quota` tokens.

        The run that crosses the quota goes to the current stage, but not to a later one: that one
        takes what it misses when it begins.
        """
        length, cover = self.demand[stage].length, stage == self._stage
        long = np.flatnonzero(free & (lengths >= length))
        if self.truncate:
            ends = np.arange(1, len(long) + 1) * length
        else:
            ends = np.cumsum(lengths[long], dtype=np.int64)
        if len(ends) and ends[-1] >= quota:
            return long[: np.searchsorted(ends, quota, side="left" if cover else "right") + cover]
        quota -= int(ends[-1]) if len(ends) else 0
        others = np.flatnonzero(free & (lengths < length))
        return np.append(long, others[longest(lengths[others], quota, cover)])
