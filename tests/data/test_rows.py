import numpy as np
import pytest

from lit_sparse.data import FILLER, RowIndex, fixed_rows
from lit_sparse.training.curriculum import Curriculum, Stage

LENGTHS = np.array([1, 300, 0, 64, 1000, 7, 128, 513])
CURRICULUM = Curriculum([Stage(32, 3), Stage(100, 4), Stage(256, 20)])


def build(seed: int = 0, rows_per_step: int = 2, lengths: np.ndarray = LENGTHS) -> RowIndex:
    return RowIndex.build(
        lengths, CURRICULUM, row_tokens=256, rows_per_step=rows_per_step, seed=seed
    )


def stream(rows: RowIndex) -> list[tuple[int, int]]:
    """(document, place in it) of every token, in the order of the rows."""
    return [
        (int(document), int(start) + i)
        for document, start, length in zip(rows.documents, rows.starts, rows.lengths, strict=True)
        for i in range(length)
    ]


def test_every_token_of_an_epoch_stands_in_the_rows_exactly_once():
    rows = build()
    tokens = stream(rows)
    corpus = {(d, i) for d, length in enumerate(LENGTHS) for i in range(length)}
    size = len(corpus)
    epochs = len(tokens) // size
    assert epochs >= 3
    orders = []
    for epoch in range(epochs):
        part = tokens[epoch * size : (epoch + 1) * size]
        assert len(set(part)) == size
        assert set(part) == corpus
        orders.append(tuple(dict.fromkeys(d for d, _ in part)))
    assert len(set(orders)) == epochs, "every epoch has an order of its own"


def test_rows_are_full_and_pieces_are_not_longer_than_the_stage():
    rows = build()
    assert len(rows) == CURRICULUM.total_steps * 2
    seen = set()
    for row in range(len(rows)):
        length = CURRICULUM.at(row // 2).length
        _, _, lengths = rows.pieces(row)
        assert lengths.sum() == 256
        assert lengths.min() >= 1
        assert lengths.max() <= length
        seen.add((length, int(lengths.max())))
    assert {(32, 32), (100, 100), (256, 256)} <= seen, "stages reach their length"


def test_a_row_holds_the_same_tokens_whatever_the_stage():
    other = Curriculum([Stage(256, 27)])
    rows = RowIndex.build(LENGTHS, other, row_tokens=256, rows_per_step=2, seed=0)
    assert stream(rows) == stream(build())


def test_loss_tokens_are_the_tokens_with_a_next_token_in_their_piece():
    rows = build()
    for row in range(len(rows)):
        assert rows.loss_tokens[row] == sum(m - 1 for m in rows.pieces(row)[2])
    assert rows.step_tokens(5) == rows.loss_tokens[10] + rows.loss_tokens[11]


def test_rows_depend_on_the_seed_and_nothing_else():
    assert stream(build(0)) == stream(build(0))
    assert stream(build(0)) != stream(build(1))
    # Rows do not know how many make a step, as long as the lengths of the stages stay.
    flat = Curriculum([Stage(64, 8)])
    two = RowIndex.build(LENGTHS, flat, row_tokens=128, rows_per_step=2, seed=0)
    flat = Curriculum([Stage(64, 2)])
    eight = RowIndex.build(LENGTHS, flat, row_tokens=128, rows_per_step=8, seed=0)
    assert np.array_equal(two.starts, eight.starts)
    assert np.array_equal(two.row_offsets, eight.row_offsets)


def test_a_stage_longer_than_every_document_names_its_key():
    with pytest.raises(
        ValueError, match=r"curriculum\.stages\[2\]\.length = 256.*has 200 .*400 in all"
    ):
        build(lengths=np.array([200, 200]))


def test_full_share():
    curriculum = Curriculum([Stage(8, 1), Stage(32, 1)])
    rows = RowIndex.build(np.array([64]), curriculum, row_tokens=64, rows_per_step=1, seed=0)
    assert rows.full_share(32) == 0.5
    assert rows.full_share(8, slice(0, 1)) == 1.0
    assert rows.full_share(32, slice(0, 1)) == 0.0


@pytest.mark.parametrize("length", [1, 7, 64, 100, 256])
def test_fixed_rows_repeat_no_token_and_fill_every_row(length):
    rows = fixed_rows(LENGTHS, length, row_tokens=256, rows=5, seed=3)
    tokens = stream(rows)
    assert len(rows) == 5
    assert len(set(tokens)) == len(tokens) == 5 * 256
    assert all(rows.pieces(row)[2].sum() == 256 for row in range(5))
    assert rows.lengths.max() == length
    assert FILLER not in rows.documents
    for document, place in tokens:
        assert 0 <= place < LENGTHS[document]


def test_fixed_rows_prefer_pieces_of_the_full_length():
    rows = fixed_rows(LENGTHS, 128, row_tokens=256, rows=4, seed=0)
    assert set(rows.lengths.tolist()) == {128}
    # A length that does not divide the row leaves room, and only the room goes to other pieces.
    rows = fixed_rows(LENGTHS, 100, row_tokens=256, rows=4, seed=0)
    assert all((rows.pieces(row)[2] == 100).sum() == 2 for row in range(4))


def test_fixed_rows_of_few_documents():
    assert len(fixed_rows(LENGTHS, 64, row_tokens=256, rows=1000, seed=0)) == LENGTHS.sum() // 256
    rows = fixed_rows(np.array([10, 20]), 64, row_tokens=256, rows=8, seed=0)
    assert len(rows) == 1
    assert rows.lengths.sum() == 256
    assert rows.lengths.max() <= 64
    assert rows.lengths[rows.documents != FILLER].tolist() == [20, 10]
    assert rows.loss_tokens.tolist() == [28]
    with pytest.raises(ValueError, match="validation_length"):
        fixed_rows(LENGTHS, 257, row_tokens=256, rows=1, seed=0)
