import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lit_sparse.data.rows.index import FILLER, Demand, RowIndex, build_rows

LENGTHS = np.array([1, 300, 0, 64, 1000, 7, 128, 513])
DOCUMENTS = np.arange(len(LENGTHS))
DEMAND = [Demand(32, 6), Demand(100, 8), Demand(256, 40)]


@pytest.fixture
def build(tmp_path):
    numbers = iter(range(1000))

    def build_(lengths=LENGTHS, demand=DEMAND, row_tokens=256, documents=None, seed=0, **options):
        out = tmp_path / str(next(numbers))
        lengths = np.asarray(lengths)
        if documents is None:
            documents = np.arange(len(lengths))
        build_rows(out, lengths, documents, demand, row_tokens, seed=seed, **options)
        return RowIndex.open(out)

    return build_


def counts(rows: RowIndex, lengths: np.ndarray, last: int | None = None) -> np.ndarray:
    """How often each token of the store stands in the first rows, document after document."""
    begins = np.cumsum(lengths) - lengths
    at = slice(0, rows.row_offsets[-1 if last is None else last])
    found = Counter()
    for document, start, length in zip(
        rows.documents[at], rows.starts[at], rows.lengths[at], strict=True
    ):
        if document != FILLER:
            assert start + length <= lengths[document]
            found.update(range(begins[document] + start, begins[document] + start + length))
    return np.array([found[token] for token in range(lengths.sum())])


def check_rows(rows: RowIndex, demand: list[Demand]) -> None:
    """Every row is full, and no piece is longer than its stage says."""
    assert len(rows) == sum(stage.rows for stage in demand)
    longest = np.repeat([stage.length for stage in demand], [stage.rows for stage in demand])
    for row, length in enumerate(longest):
        documents, _, lengths = rows.pieces(row)
        assert lengths.sum() == rows.row_tokens
        assert lengths.min() >= 1
        assert lengths.max() <= length
        assert rows.loss_tokens[row] == (lengths - 1)[documents != FILLER].sum()


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, list[Demand], int]:
    rng = np.random.default_rng(seed)
    lengths = np.maximum(0, rng.lognormal(3, 1.3, rng.integers(1, 40))).astype(np.int64)
    lengths[0] = 200
    documents = np.flatnonzero(rng.random(len(lengths)) < 0.8)
    documents = np.union1d(documents, [0])
    row_tokens = int(rng.choice([64, 128, 200]))
    stages = np.sort(rng.integers(1, row_tokens + 1, rng.integers(1, 5)))
    stages[-1] = rng.choice([stages[-1], row_tokens])
    return (
        lengths,
        documents,
        [Demand(int(n), int(rng.integers(0, 30))) for n in stages],
        row_tokens,
    )


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_leaves_no_token_out_and_gives_none_twice(build, packing, seed):
    lengths, documents, demand, row_tokens = random_case(seed)
    rows = build(
        lengths, demand, row_tokens, documents, seed, packing=packing, prefer_long=seed % 2 == 0
    )
    check_rows(rows, demand)
    every = counts(rows, lengths)
    used = np.isin(np.repeat(np.arange(len(lengths)), lengths), documents)
    assert not every[~used].any()
    corpus, given = lengths[documents].sum(), every.sum()
    epochs = rows.summary["stages"][-1]["epochs"]
    if packing == "concat":
        assert set(every[used]) <= {given // corpus, given // corpus + 1}
        assert epochs == pytest.approx(given / corpus)
    elif given:
        # One row at most waits for another epoch.
        assert every.max() <= np.ceil(epochs + row_tokens / corpus)
        assert np.maximum(np.floor(epochs) - every[used], 0).sum() <= row_tokens
        assert given <= epochs * corpus + 1e-6 < given + row_tokens


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_exactly_one_epoch(build, packing):
    lengths = np.full(64, 32)
    rows = build(lengths, [Demand(32, 8)], packing=packing)
    assert (counts(rows, lengths) == 1).all()
    assert rows.summary["stages"][0]["epochs"] == 1
    orders = [tuple(rows.documents[row * 8 : row * 8 + 8]) for row in range(8)]
    again = build(lengths, [Demand(32, 16)], packing=packing)
    assert (counts(again, lengths, 8) == 1).all()
    assert [tuple(again.pieces(8 + row)[0]) for row in range(8)] != orders, "a new order"


def test_rows_depend_on_the_arguments_and_nothing_else(build):
    for packing in ("concat", "best_fit"):
        first, second = build(packing=packing), build(packing=packing)
        for name in ("row_offsets", "documents", "starts", "lengths", "loss_tokens"):
            files = [(rows.path / f"{name}.npy").read_bytes() for rows in (first, second)]
            assert files[0] == files[1]
        other = build(packing=packing, seed=1)
        assert other.documents.tolist() != first.documents.tolist()


def test_long_stages_get_the_long_documents(build):
    rng = np.random.default_rng(0)
    lengths = np.where(np.arange(3000) % 10 == 0, 1024, rng.integers(1, 200, 3000))
    tokens = int(lengths.sum())
    demand = [Demand(64, tokens // 1024 // 2), Demand(1024, tokens // 1024 // 4)]
    chosen = build(lengths, demand, 1024)
    assert chosen.full_share(1024, slice(demand[0].rows, None)) == 1
    plain = build(lengths, demand, 1024, prefer_long=False)
    assert plain.full_share(1024, slice(demand[0].rows, None)) < 0.8
    # Too few long ones for all that the stage asks: the longest of the rest come next.
    demand = [Demand(64, 50), Demand(1024, tokens // 1024 - 100)]
    rows = build(lengths, demand, 1024)
    early = rows.documents[: rows.row_offsets[50]]
    assert lengths[early[early != FILLER]].max() < 130
    every = counts(rows, lengths)
    assert every.max() == 1


def test_a_document_divided_between_stages_goes_on_where_it_stopped(build):
    for packing in ("concat", "best_fit"):
        rows = build([1000], [Demand(16, 2), Demand(50, 3), Demand(100, 3)], 100, packing=packing)
        every = counts(rows, np.array([1000]))
        assert every.max() == 1
        # Six pieces of 16 leave four tokens of a row free.
        assert every.sum() == (800 if packing == "concat" else 792)
        if packing == "concat":
            assert (rows.starts == np.cumsum(rows.lengths) - rows.lengths).all()


def test_truncation_gives_the_beginning_of_each_document(build):
    lengths = np.array([10, 50, 64, 65, 300, 20, 0, 128])
    rows = build(lengths, [Demand(64, 40)], 128, truncate=True, packing="concat")
    real = rows.documents != FILLER
    assert not rows.starts[real].any()
    pieces = zip(rows.documents[real].tolist(), rows.lengths[real].tolist(), strict=True)
    assert dict(pieces) == {0: 10, 1: 50, 2: 64, 3: 64, 4: 64, 5: 20, 7: 64}
    stage = rows.summary["stages"][0]
    cut = np.isin(rows.documents, [3, 4, 7])
    assert stage["documents_truncated"] == cut.sum()
    assert stage["tokens_truncated"] == (lengths[rows.documents[cut]] - 64).sum()
    assert "truncated" in rows.describe()


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_document_stands_once_in_an_epoch(build, seed):
    lengths, documents, demand, row_tokens = random_case(seed)
    rows = build(
        lengths, demand, row_tokens, documents, seed, truncate=True, prefer_long=seed % 2 == 0
    )
    check_rows(rows, demand)
    times = np.bincount(rows.documents[rows.documents != FILLER], minlength=len(lengths))
    epochs = rows.summary["stages"][-1]["epochs"]
    assert times.max() <= np.ceil(epochs + row_tokens / lengths[documents].sum())
    missing = np.maximum(np.floor(epochs) - 1 - times[documents[lengths[documents] > 0]], 0)
    assert missing.sum() <= row_tokens
    longest = np.repeat(
        np.repeat([stage.length for stage in demand], [stage.rows for stage in demand]),
        np.diff(rows.row_offsets),
    )
    real = rows.documents != FILLER
    whole = np.minimum(lengths[rows.documents], longest)
    assert (rows.lengths[real] == whole[real]).all()


def test_a_longer_stage_truncates_less_of_what_a_shorter_one_did_not_use(build):
    lengths = np.full(40, 100)
    rows = build(lengths, [Demand(30, 3), Demand(100, 20)], 100, truncate=True)
    longer = rows.lengths[rows.row_offsets[3] :]
    assert set(longer.tolist()) == {100}


def test_upsampling_repeats_long_documents(build):
    lengths = np.array([10] * 200 + [100] * 200)
    for times in (2, 2.5, 1):
        epoch = 200 * 10 + 200 * 100 * times
        rows = build(lengths, [Demand(100, 10 * int(epoch) // 100)], 100, upsample=(50, times))
        every = counts(rows, lengths).astype(float)
        assert every[:2000].mean() == pytest.approx(10, rel=0.03)
        assert every[2000:].mean() == pytest.approx(10 * times, rel=0.03)
        if times != 2.5:
            assert every[2000:].max() - every[2000:].min() <= 2 * times


def test_loss_tokens_of_the_caller(build):
    calls = []

    def count(documents, starts, lengths):
        calls.append(len(documents))
        assert (documents >= 0).all()
        return np.where(documents % 2 == 0, 0, lengths // 2)

    rows = build(LENGTHS, DEMAND, count_loss=count)
    for row in range(len(rows)):
        expected = sum(
            length // 2
            for document, _, length in zip(*rows.pieces(row), strict=True)
            if document % 2 and document != FILLER
        )
        assert rows.loss_tokens[row] == expected
    assert len(calls) < len(rows), "many pieces at once"


def test_the_summary_counts_the_pieces(build):
    for packing in ("concat", "best_fit"):
        rows = build(packing=packing)
        first = 0
        for stage, demand in zip(rows.summary["stages"], DEMAND, strict=True):
            at = slice(rows.row_offsets[first], rows.row_offsets[first + demand.rows])
            documents, starts, lengths = rows.documents[at], rows.starts[at], rows.lengths[at]
            first += demand.rows
            real = documents != FILLER
            assert stage["filler_tokens"] == lengths[~real].sum()
            assert stage["cuts"] == np.count_nonzero(starts)
            assert stage["full_tokens"] == lengths[real & (lengths >= demand.length)].sum()
        assert len(rows.describe().splitlines()) == len(DEMAND)


def test_a_row_index_pickles_as_its_path(build):
    rows = build()
    data = pickle.dumps(rows)
    assert len(data) < 500
    again = pickle.loads(data)
    assert isinstance(again.documents, np.memmap)
    assert again.documents.tolist() == rows.documents.tolist()
    assert again.summary == rows.summary


def test_an_incomplete_directory_is_refused(build):
    path = Path(build().path)
    for name, harm in (("rows.json", Path.unlink), ("starts.npy", lambda p: p.write_bytes(b""))):
        harm(path / name)
        with pytest.raises(ValueError, match="no complete row index .* delete it"):
            RowIndex.open(path)


def test_bad_arguments_name_their_key(build):
    with pytest.raises(ValueError, match=r"curriculum\.stages\[0\]\.length = 300.*row_tokens"):
        build(demand=[Demand(300, 1)])
    with pytest.raises(ValueError, match=r"data\.packing.*best_fit, concat"):
        build(packing="worst")
    with pytest.raises(ValueError, match=r"data\.upsample.*0\.5"):
        build(upsample=(10, 0.5))
    with pytest.raises(ValueError, match="no token"):
        build(np.zeros(3, np.int64))


def test_a_stage_longer_than_every_document_is_for_the_run_to_judge(build):
    assert len(build(np.array([200, 200]))) == 54


def test_full_share():
    lengths = np.array([8, 8, 16, 32, 32])
    offsets = np.array([0, 3, 4, 5])
    documents = np.array([0, 1, 2, 3, FILLER])
    rows = RowIndex(offsets, documents, np.zeros(5, np.int64), lengths, np.zeros(3), 32)
    assert rows.full_share(16) == pytest.approx(48 / 96)
    assert rows.full_share(16, slice(0, 1)) == 0.5
    assert rows.full_share(16, slice(1, 2)) == 1
