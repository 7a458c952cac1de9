"""The rows to validate on: as many at every context length, of documents kept apart."""

from __future__ import annotations

from collections import deque

import numpy as np

from lit_sparse.data.rows.epochs import longest
from lit_sparse.data.rows.index import FILLER, CountLoss, RowIndex

Piece = tuple[int, int, int]
"""Document, first token, tokens."""


def count_fixed_rows(tokens: int, row_tokens: int, rows: int) -> int:
    """Rows that `fixed_rows` makes of `tokens` tokens: as many at every stage length."""
    return max(1, min(rows, tokens // row_tokens))


def fixed_rows(
    lengths: np.ndarray,
    documents: np.ndarray,
    length: int,
    row_tokens: int,
    rows: int,
    seed: int,
    truncate: bool = False,
    count_loss: CountLoss | None = None,
) -> RowIndex:
    """Rows to validate on at one context length. No token stands in them twice.

    Pieces of the full length come first, drawn over all documents that are long enough; what room
    they leave is taken by the longest of the other pieces. If the documents hold fewer tokens than
    one row, it is filled up with `FILLER`, which carries no label.

    Args:
        lengths: tokens of every document of the store [documents of the store].
        documents: numbers of the documents to use, int64.
        length: longest piece, in tokens; at most `row_tokens`.
        row_tokens: tokens of a row.
        rows: how many rows at most; there are fewer (but one) if the documents do not hold as many
            tokens.
        seed: of the choice; not negative.
        truncate, count_loss: as in `build_rows`; pieces are then never cut by the end of a row.
    """
    if not 1 <= length <= row_tokens:
        raise ValueError(
            f"validation_length must be in [1, row_tokens = {row_tokens}], got {length}"
        )
    used = lengths[documents]
    rows = count_fixed_rows(int(used.sum()), row_tokens, rows)
    if truncate:
        used = np.minimum(used, length)
    rng = np.random.default_rng((seed, length))

    # Full pieces, numbered through all documents; more than the rows could hold are of no use.
    ends = np.cumsum(used // length)
    wanted = min(rows * (row_tokens // length + 1), int(ends[-1]))
    drawn = rng.choice(int(ends[-1]), wanted, replace=False) if wanted else np.zeros(0, np.int64)
    owner = np.searchsorted(ends, drawn, side="right")
    start = (drawn - ends[owner] + used[owner] // length) * length
    full = deque((int(d), int(s), length) for d, s in zip(documents[owner], start, strict=True))
    # The longest remainders, as many as the full pieces leave room for.
    rest_length = used % length
    room = rows * row_tokens - min(len(full), rows * (row_tokens // length)) * length
    chosen = longest(rest_length, room, cover=True)
    chosen = chosen[np.argsort(-rest_length[chosen], kind="stable")]
    rest = deque(
        (int(documents[i]), int(used[i] - rest_length[i]), int(rest_length[i])) for i in chosen
    )

    row_of_piece: list[int] = []
    pieces: list[tuple[int, int, int]] = []
    for row in range(rows):
        room = row_tokens
        while room:
            document, first, tokens = _next(full, rest, room, length, truncate)
            taken = min(tokens, room)
            if taken < tokens and document != FILLER:
                rest.appendleft((document, first + taken, tokens - taken))
            pieces.append((document, first, taken))
            row_of_piece.append(row)
            room -= taken
    document_of, start_of, length_of = np.array(pieces, dtype=np.int64).T
    row_offsets = np.searchsorted(row_of_piece, np.arange(rows + 1)).astype(np.int64)
    real = document_of != FILLER
    labels = np.where(real, length_of - 1, 0)
    if count_loss is not None:
        labels[real] = count_loss(document_of[real], start_of[real], length_of[real])
    loss_tokens = np.add.reduceat(labels, row_offsets[:-1])
    return RowIndex(row_offsets, document_of, start_of, length_of, loss_tokens, row_tokens)


def _next(full: deque[Piece], rest: deque[Piece], room: int, length: int, whole: bool) -> Piece:
    """The piece that a row with `room` takes next; if `whole`, one that is not cut by its end."""
    if full and (room >= length or not (rest or whole)):
        return full.popleft()
    for i, piece in enumerate(rest):
        if not whole or piece[2] <= room:
            del rest[i]
            return piece
    return FILLER, 0, length
