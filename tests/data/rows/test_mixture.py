import itertools

import numpy as np
import pytest

from lit_sparse.data.rows.mixture import check_weights, schedule


def deviation(weights: np.ndarray, rows: np.ndarray, stores: np.ndarray) -> float:
    """Largest difference of a store's rows from its share, after any row."""
    target = np.cumsum(np.repeat(weights, rows, axis=0), axis=0)
    count = np.cumsum(stores[:, None] == np.arange(weights.shape[1]), axis=0)
    return float(np.abs(target - count).max(initial=0))


def random_weights(rng: np.random.Generator, zeros: float) -> tuple[np.ndarray, np.ndarray]:
    stages, stores = int(rng.integers(1, 6)), int(rng.integers(2, 11))
    weights = rng.random((stages, stores)) ** rng.integers(1, 4)
    weights[rng.random((stages, stores)) < zeros] = 0
    weights[np.arange(stages), rng.integers(stores, size=stages)] += 0.1
    return weights / weights.sum(axis=1, keepdims=True), rng.integers(0, 60, stages)


@pytest.mark.parametrize("zeros", [0, 0.4, 0.8])
def test_no_store_is_a_row_away_from_its_share(zeros):
    rng = np.random.default_rng(int(zeros * 10))
    for _ in range(200):
        weights, rows = random_weights(rng, zeros)
        stores = schedule(weights, rows)
        assert stores.dtype == np.uint16
        assert len(stores) == rows.sum()
        assert deviation(weights, rows, stores) < 1
        stage = np.repeat(np.arange(len(rows)), rows)
        assert (weights[stage, stores] > 0).all(), "nothing from a store without weight"


def test_no_schedule_of_few_rows_is_missed():
    """Wherever any sequence of stores is less than a row away, the schedule is one of them."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        weights = rng.random((2, 3)) * (rng.random((2, 3)) < 0.6) + 1e-3 * np.eye(3)[:2]
        weights /= weights.sum(axis=1, keepdims=True)
        rows = rng.integers(1, 4, 2)
        stage = np.repeat([0, 1], rows)
        valid = [
            sequence
            for sequence in itertools.product(range(3), repeat=int(rows.sum()))
            if all(weights[s, store] > 0 for s, store in zip(stage, sequence, strict=True))
            and deviation(weights, rows, np.array(sequence)) < 1
        ]
        assert tuple(schedule(weights, rows).tolist()) in valid


def test_equal_weights_take_turns():
    stores = schedule(np.full((1, 4), 0.25), np.array([40]))
    for turn in stores.reshape(10, 4):
        assert sorted(turn.tolist()) == [0, 1, 2, 3]
    assert schedule(np.array([[0.75, 0.25]]), np.array([8])).reshape(2, 4).sum(1).tolist() == [1, 1]


def test_a_long_run_with_uneven_weights():
    weights = np.array([[0.9, 0.0999, 0.0001], [0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    rows = np.array([70_000, 20_001, 60_000])
    assert deviation(weights, rows, schedule(weights, rows)) < 1


def test_one_store_and_no_rows():
    assert schedule(np.ones((2, 1)), np.array([3, 4])).tolist() == [0] * 7
    assert len(schedule(np.array([[0.5, 0.5]]), np.array([0]))) == 0
    assert schedule(np.array([[0.0, 1.0]]), np.array([3])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("weights", [[[0.5, 0.4]], [[1.5, -0.5]]])
def test_shares_that_are_none(weights):
    with pytest.raises(ValueError, match="sum to 1"):
        schedule(np.array(weights), np.array([3]))


def test_weights_are_normalised_in_the_order_given():
    weights = check_weights({"web": 3, "books": 1, "code": 0}, "data.mixture")
    assert list(weights.items()) == [("web", 0.75), ("books", 0.25), ("code", 0.0)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "data.mixture is empty"),
        ({"web": 1, "books": -0.5}, r"data.mixture\['books'\].*-0.5"),
        ({"web": float("nan")}, r"data.mixture\['web'\].*nan"),
        ({"web": float("inf")}, r"data.mixture\['web'\].*inf"),
        ({"web": "much"}, r"data.mixture\['web'\].*much"),
        ({"web": 0, "books": 0.0}, "all weights are 0.*web.*books"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights, "data.mixture")
