import pickle

import numpy as np
import pytest

from lit_sparse.data.rows.index import FILLER, RowIndex
from lit_sparse.data.rows.validation import fixed_rows

LENGTHS = np.array([1, 300, 0, 64, 1000, 7, 128, 513])
DOCUMENTS = np.arange(len(LENGTHS))


def tokens(rows: RowIndex) -> list[tuple[int, int]]:
    return [
        (int(document), int(start) + i)
        for document, start, length in zip(rows.documents, rows.starts, rows.lengths, strict=True)
        for i in range(length)
    ]


@pytest.mark.parametrize("length", [1, 7, 64, 100, 256])
def test_fixed_rows_repeat_no_token_and_fill_every_row(length):
    rows = fixed_rows(LENGTHS, DOCUMENTS, length, row_tokens=256, rows=5, seed=3)
    found = tokens(rows)
    assert len(rows) == 5
    assert len(set(found)) == len(found) == 5 * 256
    assert all(rows.pieces(row)[2].sum() == 256 for row in range(5))
    assert rows.lengths.max() == length
    assert FILLER not in rows.documents
    assert all(0 <= place < LENGTHS[document] for document, place in found)


def test_fixed_rows_prefer_pieces_of_the_full_length():
    rows = fixed_rows(LENGTHS, DOCUMENTS, 128, row_tokens=256, rows=4, seed=0)
    assert set(rows.lengths.tolist()) == {128}
    # A length that does not divide the row leaves room, and only the room goes to other pieces.
    rows = fixed_rows(LENGTHS, DOCUMENTS, 100, row_tokens=256, rows=4, seed=0)
    assert all((rows.pieces(row)[2] == 100).sum() == 2 for row in range(4))


def test_fixed_rows_of_few_documents():
    total = LENGTHS.sum()
    assert len(fixed_rows(LENGTHS, DOCUMENTS, 64, 256, rows=1000, seed=0)) == total // 256
    rows = fixed_rows(np.array([99, 10, 20]), np.array([1, 2]), 64, 256, rows=8, seed=0)
    assert len(rows) == 1
    assert rows.lengths.sum() == 256
    assert rows.lengths.max() <= 64
    real = rows.documents != FILLER
    assert rows.lengths[real].tolist() == [20, 10]
    assert rows.documents[real].tolist() == [2, 1]
    assert rows.loss_tokens.tolist() == [28]
    with pytest.raises(ValueError, match="validation_length"):
        fixed_rows(LENGTHS, DOCUMENTS, 257, row_tokens=256, rows=1, seed=0)


def test_rows_that_were_not_written_pickle_whole():
    rows = fixed_rows(LENGTHS, DOCUMENTS, 64, 256, 2, seed=0)
    assert pickle.loads(pickle.dumps(rows)).lengths.tolist() == rows.lengths.tolist()


def test_rows_of_conversations_never_go_on_in_another_row():
    sizes = np.random.default_rng(2).integers(1, 400, 60)

    def count(documents, starts, lengths):
        return lengths // 2

    rows = fixed_rows(sizes, np.arange(60), 128, 256, 8, seed=0, truncate=True, count_loss=count)
    real = rows.documents != FILLER
    assert len(rows) == 8
    assert not rows.starts[real].any()
    assert (rows.lengths[real] == np.minimum(sizes, 128)[rows.documents[real]]).all()
    assert len(set(rows.documents[real].tolist())) == real.sum()
    assert rows.loss_tokens.sum() == (rows.lengths[real] // 2).sum()
    assert (np.add.reduceat(rows.lengths, rows.row_offsets[:-1]) == 256).all()
