"""The row index: which pieces of which documents stand in which row of the run.

All rows are decided at once, from document lengths, the curriculum and a seed. Nothing is drawn
while the run goes on, so the batch of an optimizer step is a look-up, whatever the ranks, workers
or restarts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_sparse.training.curriculum import Curriculum

FILLER = -1
"""Document number of tokens that only fill a row up; they carry no label."""


@dataclass(frozen=True)
class RowIndex:
    """Pieces of documents, row by row.

    Args:
        row_offsets: int64 [rows + 1]; the pieces of row r are `row_offsets[r]:row_offsets[r + 1]`.
        documents: int64 [pieces], number of the document, or `FILLER`.
        starts: int64 [pieces], first token of the piece, counted in its document.
        lengths: int64 [pieces], tokens of the piece, at least 1.
        loss_tokens: int64 [rows], labels of each row: a piece of m tokens predicts m - 1 of them.
        row_tokens: tokens of every row.
        rows_per_step: rows of an optimizer step.
    """

    row_offsets: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    loss_tokens: np.ndarray
    row_tokens: int
    rows_per_step: int = 1

    def __len__(self) -> int:
        """Rows."""
        return len(self.row_offsets) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, starts and lengths of the pieces of a row, in order."""
        at = slice(self.row_offsets[row], self.row_offsets[row + 1])
        return self.documents[at], self.starts[at], self.lengths[at]

    def step_tokens(self, step: int) -> int:
        """Loss tokens of the optimizer step `step` (from 0), over all ranks and accumulations."""
        return int(
            self.loss_tokens[step * self.rows_per_step : (step + 1) * self.rows_per_step].sum()
        )

    def full_share(self, length: int, rows: slice = slice(None)) -> float:
        """Share of the tokens of some rows that stand in a piece of at least `length` tokens."""
        first, last, _ = rows.indices(len(self))
        lengths = self.lengths[self.row_offsets[first] : self.row_offsets[last]]
        return float(lengths[lengths >= length].sum() / max(lengths.sum(), 1))

    @classmethod
    def build(
        cls,
        lengths: np.ndarray,
        curriculum: Curriculum,
        row_tokens: int,
        rows_per_step: int,
        seed: int,
    ) -> RowIndex:
        """All `curriculum.total_steps * rows_per_step` rows of a run: concatenate and cut.

        The documents stand one after the other in a shuffled order, a new one in every epoch, and
        row r is the tokens `r * row_tokens` up to `(r + 1) * row_tokens` of that stream. So a row
        is always full and no token is left out. What stands of a document in a row is cut into
        pieces of the length of the row's stage, the last one shorter; every piece is a document of
        its own. Which tokens a row holds does not depend on the curriculum, only how they are cut.

        Args:
            lengths: tokens of each document [documents].
            curriculum: gives the steps and the length of each stage.
            row_tokens: tokens of a row.
            rows_per_step: rows of an optimizer step.
            seed: of the order; not negative.

        Raises:
            ValueError: no document is as long as a stage; the message names the stage's key.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        corpus = int(lengths.sum())
        longest = int(lengths.max(initial=0))
        for i, stage in enumerate(curriculum.stages):
            if stage.length > longest:
                raise ValueError(
                    f"curriculum.stages[{i}].length = {stage.length} tokens, but the longest "
                    f"training document of data.path has {longest} (the corpus {corpus} in all), "
                    "so the stage would not train longer contexts; shorten it or add longer "
                    "documents"
                )
        rows = curriculum.total_steps * rows_per_step
        total = rows * row_tokens

        # The stream of documents, as far as the run reads it.
        epochs = -(-total // corpus)
        order = np.concatenate(
            [
                np.random.default_rng((seed, epoch)).permutation(len(lengths))
                for epoch in range(epochs)
            ]
        )
        order = order[lengths[order] > 0]
        begins = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        order, begins = order[begins < total], begins[begins < total]

        # Segments: what lies between two ends, of documents or of rows.
        at = np.union1d(begins, np.arange(rows, dtype=np.int64) * row_tokens)
        segment = np.diff(np.append(at, total))
        owner = np.searchsorted(begins, at, side="right") - 1
        row = at // row_tokens
        stage_of = np.searchsorted(curriculum.ends, row // rows_per_step, side="right")
        cap = np.array([stage.length for stage in curriculum.stages], dtype=np.int64)[stage_of]

        # Pieces of a segment: all of the stage's length but the last.
        count = -(-segment // cap)
        offsets = np.concatenate([[0], np.cumsum(count)])
        skipped = (np.arange(offsets[-1]) - np.repeat(offsets[:-1], count)) * np.repeat(cap, count)
        piece = np.minimum(np.repeat(cap, count), np.repeat(segment, count) - skipped)
        row_of_piece = np.repeat(row, count)
        return cls._from_pieces(
            row_of_piece,
            rows,
            np.repeat(order[owner], count),
            np.repeat(at - begins[owner], count) + skipped,
            piece,
            row_tokens,
            rows_per_step,
        )

    @classmethod
    def _from_pieces(
        cls,
        row_of_piece: np.ndarray,
        rows: int,
        documents: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        row_tokens: int,
        rows_per_step: int,
    ) -> RowIndex:
        labels = np.where(documents == FILLER, 0, lengths - 1)
        sums = np.concatenate([[0], np.cumsum(labels)])
        row_offsets = np.searchsorted(row_of_piece, np.arange(rows + 1)).astype(np.int64)
        return cls(
            row_offsets=row_offsets,
            documents=documents,
            starts=starts,
            lengths=lengths,
            loss_tokens=np.diff(sums[row_offsets]).astype(np.int64),
            row_tokens=row_tokens,
            rows_per_step=rows_per_step,
        )


def count_fixed_rows(lengths: np.ndarray, row_tokens: int, rows: int) -> int:
    """Rows that `fixed_rows` makes of documents of those lengths: as many at every stage length."""
    return max(1, min(rows, int(np.sum(lengths)) // row_tokens))


def fixed_rows(lengths: np.ndarray, length: int, row_tokens: int, rows: int, seed: int) -> RowIndex:
    """Rows to validate on at one context length. No token stands in them twice.

    Pieces of the full length come first, drawn over all documents that are long enough; what room
    they leave is taken by the longest of the other pieces. If the documents hold fewer tokens than
    one row, it is filled up with `FILLER`, which carries no label.

    Args:
        lengths: tokens of each document [documents].
        length: longest piece, in tokens; at most `row_tokens`.
        row_tokens: tokens of a row.
        rows: how many rows at most; there are fewer (but one) if the documents do not hold as many
            tokens.
        seed: of the choice; not negative.
    """
    if not 1 <= length <= row_tokens:
        raise ValueError(
            f"validation_length must be in [1, row_tokens = {row_tokens}], got {length}"
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = count_fixed_rows(lengths, row_tokens, rows)

    whole = lengths // length
    document = np.repeat(np.arange(len(lengths)), whole)
    number = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    drawn = np.random.default_rng((seed, length)).permutation(len(document))
    # More full pieces than the rows could hold are of no use, and Python tuples are large.
    drawn = drawn[: rows * (row_tokens // length + 1)]
    chosen = zip(document[drawn], number[drawn], strict=True)
    full = deque((int(d), int(n) * length, length) for d, n in chosen)
    rest_length = lengths % length
    by_length = np.argsort(-rest_length, kind="stable")[: np.count_nonzero(rest_length)]
    by_length = by_length[: rows * row_tokens]
    rest = deque((int(d), int(whole[d]) * length, int(rest_length[d])) for d in by_length)

    row_of_piece: list[int] = []
    pieces: list[tuple[int, int, int]] = []
    for row in range(rows):
        room = row_tokens
        while room:
            if full and (room >= length or not rest):
                source = full
            elif rest:
                source = rest
            else:
                rest.append((FILLER, 0, room))
                continue
            document_, start, tokens = source.popleft()
            taken = min(tokens, room)
            if taken < tokens:
                rest.appendleft((document_, start + taken, tokens - taken))
            if document_ == FILLER:
                taken = min(taken, length)
            pieces.append((document_, start, taken))
            row_of_piece.append(row)
            room -= taken
    columns = np.array(pieces, dtype=np.int64)
    return RowIndex._from_pieces(
        np.array(row_of_piece), rows, columns[:, 0], columns[:, 1], columns[:, 2], row_tokens, 1
    )
