from collections import Counter

import numpy as np
import pytest

from lit_sparse.data.rows.index import FILLER, Demand, RowIndex, build_rows
from lit_sparse.data.rows.packing import best_fit


def one_by_one(lengths: np.ndarray, capacity: int) -> list[int]:
    """Room of each row, sorted: best-fit decreasing as the textbook has it."""
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [r for r in range(len(room)) if room[r] >= length]
        if fits:
            room[min(fits, key=lambda r: room[r])] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_the_textbook_rule(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.choice([20, 100, 1000]))
    lengths = rng.integers(1, capacity // int(rng.integers(1, 5)) + 1, rng.integers(1, 200))
    lengths = np.sort(lengths)[::-1]
    row, made = best_fit(lengths, capacity)
    assert len(row) == len(lengths)
    room = capacity - np.bincount(row, lengths, minlength=made)
    assert len(room) == made
    assert room.min() >= 0
    assert sorted(room.tolist()) == one_by_one(lengths, capacity)


def test_best_fit_of_equal_pieces():
    row, made = best_fit(np.full(1000, 30), 100)
    assert made == 334
    assert Counter(Counter(row.tolist()).values()) == {3: 333, 1: 1}
    row, made = best_fit(np.full(1000, 100), 100)
    assert sorted(row.tolist()) == list(range(1000))
    assert made == 1000


@pytest.fixture(scope="module")
def realistic(tmp_path_factory):
    """One epoch of 20,000 documents of about 1,000 tokens, packed both ways."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.2, 1.2, 20_000), 10**5).astype(np.int64) + 1
    demand = [Demand(4096, int(lengths.sum()) // 8192)]
    rows = {}
    for packing in ("concat", "best_fit"):
        out = tmp_path_factory.mktemp(packing)
        build_rows(out, lengths, np.arange(len(lengths)), demand, 8192, packing=packing, seed=1)
        rows[packing] = RowIndex.open(out)
    return lengths, rows


def test_best_fit_cuts_no_document_that_fits(realistic):
    lengths, rows = realistic
    stage = rows["best_fit"].summary["stages"][0]
    assert stage["documents_cut"] == 0
    assert stage["cuts"] <= ((lengths - 1) // 4096).sum()
    real = rows["best_fit"].documents != FILLER
    pieces = rows["best_fit"].documents[real], rows["best_fit"].lengths[real]
    fits = lengths[pieces[0]] <= 4096
    assert (pieces[1][fits] == lengths[pieces[0][fits]]).all()
    concat = rows["concat"].summary["stages"][0]
    assert concat["documents_cut"] > 500
    assert concat["cuts"] > stage["cuts"]
    # Documents in one piece are also longer pieces.
    assert rows["best_fit"].full_share(4096) > rows["concat"].full_share(4096)


def test_best_fit_leaves_little_room(realistic):
    _, rows = realistic
    best_fit_rows = rows["best_fit"]
    filler = best_fit_rows.summary["stages"][0]["filler_tokens"]
    assert filler < 0.002 * len(best_fit_rows) * 8192
    assert rows["concat"].summary["stages"][0]["filler_tokens"] == 0


def test_rows_come_in_no_order_of_size(realistic):
    _, rows = realistic
    packed = rows["best_fit"]
    pieces = np.diff(packed.row_offsets)
    half = len(packed) // 2
    # Of rows in the order that they were packed in, the first would hold few and long pieces.
    assert pieces[:half].mean() == pytest.approx(pieces[half:].mean(), rel=0.1)


def test_what_was_left_over_does_not_come_last(tmp_path):
    correlations = []
    for seed in range(60):
        lengths = np.random.default_rng(seed).lognormal(5, 1, 400).astype(np.int64) + 1
        out = tmp_path / str(seed)
        build_rows(out, lengths, np.arange(400), [Demand(256, 40)], 512, seed=seed)
        pieces = np.diff(RowIndex.open(out).row_offsets)
        correlations.append(np.corrcoef(pieces, np.arange(40))[0, 1])
    assert abs(np.mean(correlations)) < 0.07


def test_concatenation_follows_one_stream(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    whole = int(lengths.sum()) // 64
    build_rows(
        tmp_path,
        lengths,
        np.arange(200),
        [Demand(64, whole)],
        64,
        packing="concat",
        seed=0,
    )
    rows = RowIndex.open(tmp_path)
    # A piece that begins inside a document goes on where the row before stopped.
    for piece in np.flatnonzero(rows.starts):
        assert rows.documents[piece] == rows.documents[piece - 1]
        assert rows.starts[piece] == rows.starts[piece - 1] + rows.lengths[piece - 1]
        assert piece in rows.row_offsets


def test_rows_much_longer_than_their_pieces(tmp_path):
    lengths = np.array([5, 3, 17, 10_000])
    for packing in ("concat", "best_fit"):
        demand = [Demand(1, 2), Demand(16, 3)]
        build_rows(tmp_path / packing, lengths, np.arange(4), demand, 4096, packing=packing, seed=0)
        rows = RowIndex.open(tmp_path / packing)
        assert np.diff(rows.row_offsets)[:2].tolist() == [4096, 4096]
        assert rows.lengths.max() == 16
        assert rows.loss_tokens[:2].tolist() == [0, 0]


def test_a_store_smaller_than_a_row(tmp_path):
    lengths = np.array([100, 30, 7, 60])
    build_rows(tmp_path, lengths, np.arange(4), [Demand(100, 20)], 4096, seed=0)
    rows = RowIndex.open(tmp_path)
    assert rows.summary["stages"][0]["filler_tokens"] < 0.05 * 20 * 4096
    times = np.bincount(rows.documents[rows.documents != FILLER])
    assert times.max() - times.min() <= 4096 / lengths.sum() + 1


def test_documents_that_leave_room_beside_each_other(tmp_path):
    lengths = np.full(30, 60)
    build_rows(tmp_path, lengths, np.arange(30), [Demand(60, 45)], 100, seed=0)
    rows = RowIndex.open(tmp_path)
    real = rows.documents != FILLER
    assert np.diff(rows.row_offsets).tolist() == [2] * 45
    assert rows.lengths[real].tolist() == [60] * 45
    # One and a half epochs, of which one document at most waited for the next.
    seen = np.bincount(rows.documents[real], minlength=30)
    assert set(seen.tolist()) <= {1, 2}
    assert rows.loss_tokens.tolist() == [59] * 45
