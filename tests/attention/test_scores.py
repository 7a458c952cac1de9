"""The pluggable scorers, one by one and through select()."""

import math

import pytest
import torch

from lit_sparse.attention import select
from lit_sparse.attention.scores import SCORERS, Scorer, get_scorer
from lit_sparse.budget import Budget

TIGHT = Budget.fixed(72, sink=8, local=0.0, late=0.3)
SCALE = 0.37


@pytest.fixture
def case():
    """q [H, R, G, D], blocks [H, N, block, D] and hidden [R, N]."""
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2, 6, 3, 8, generator=generator, dtype=torch.float64)
    blocks = 2 * torch.randn(2, 5, 4, 8, generator=generator, dtype=torch.float64)
    hidden = torch.arange(5) >= torch.tensor([1, 2, 3, 4, 5, 5])[:, None]
    return q, blocks, hidden


def _score(name, q, blocks, hidden):
    scorer = get_scorer(name)
    return scorer.rows(q, scorer.prepare(blocks), hidden, SCALE)


def _each(q, blocks, hidden):
    """Head, row, number of visible blocks."""
    for head in range(q.shape[0]):
        for row in range(q.shape[1]):
            yield head, row, int((~hidden[row]).sum())


def test_exact_is_the_true_mass_of_the_block(case):
    q, blocks, hidden = case
    scores = _score("exact", q, blocks, hidden)
    for head, row, seen in _each(*case):
        expected = torch.zeros(5, dtype=torch.float64)
        for g in range(3):
            keys = blocks[head, :seen].reshape(-1, 8)
            weights = (SCALE * keys @ q[head, row, g]).softmax(0)
            expected[:seen] += weights.view(seen, 4).sum(1)
        torch.testing.assert_close(scores[head, row, :seen], expected[:seen])


def test_mass_is_the_softmax_of_the_mean_keys(case):
    q, blocks, hidden = case
    scores = _score("mass", q, blocks, hidden)
    for head, row, seen in _each(*case):
        expected = 0
        for g in range(3):
            logits = SCALE * blocks[head, :seen].mean(1) @ q[head, row, g] + math.log(4)
            expected += logits.softmax(0)
        torch.testing.assert_close(scores[head, row, :seen], expected)
        assert scores[head, row, :seen].sum() == pytest.approx(3)


def test_mean_is_its_logit_summed_over_the_heads(case):
    q, blocks, hidden = case
    scores = _score("mean", q, blocks, hidden)
    for head, row, seen in _each(*case):
        expected = SCALE * blocks[head, :seen].mean(1) @ q[head, row].sum(0)
        torch.testing.assert_close(scores[head, row, :seen], expected)


def test_variance_adds_half_the_variance_of_independent_dimensions(case):
    q, blocks, hidden = case
    scores = _score("variance", q, blocks, hidden)
    for head, row, seen in _each(*case):
        expected = 0
        for g in range(3):
            query = SCALE * q[head, row, g]
            logits = blocks[head, :seen].mean(1) @ query
            logits += blocks[head, :seen].var(1, unbiased=False) @ query**2 / 2
            expected += logits.softmax(0)
        torch.testing.assert_close(scores[head, row, :seen], expected)


def test_variance_is_exact_for_gaussian_keys():
    """The log of the mean of e^s, of many keys with independent dimensions."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.2, 1.0, 1.5, 0.5])[:, None, None]
    blocks = spread * torch.randn(1, 4, 200_000, 8, generator=generator) + 0.3
    q = torch.randn(1, 1, 1, 8, generator=generator)
    hidden = torch.zeros(1, 4, dtype=torch.bool)
    wanted = (SCALE * blocks[0] @ q[0, 0, 0]).logsumexp(-1).softmax(-1)
    torch.testing.assert_close(
        _score("variance", q, blocks, hidden)[0, 0], wanted, atol=5e-3, rtol=0
    )


def test_minmax_ranks_by_a_bound_on_the_largest_logit(case):
    q, blocks, hidden = case
    scores = _score("minmax", q, blocks, hidden)
    for head, row, seen in _each(*case):
        expected = 0
        for g in range(3):
            query = q[head, row, g]
            top, low = blocks[head, :seen].amax(1), blocks[head, :seen].amin(1)
            bound = SCALE * torch.maximum(top * query, low * query).sum(1)
            true = (SCALE * blocks[head, :seen] @ query).amax(1)
            assert (bound >= true - 1e-12).all()
            expected += bound.softmax(0)
        torch.testing.assert_close(scores[head, row, :seen], expected)


@pytest.mark.parametrize("name", SCORERS)
def test_hidden_blocks_do_not_influence_a_row(name, case):
    q, blocks, hidden = case
    before = _score(name, q, blocks, hidden)
    changed = blocks.clone()
    changed[:, 3:] = 50.0
    after = _score(name, q, changed, hidden)
    for head, row, seen in _each(*case):
        visible = min(seen, 3)
        if seen <= 3:
            assert torch.equal(before[head, row, :visible], after[head, row, :visible])


@pytest.mark.parametrize("name", SCORERS)
def test_a_planted_block_is_found_by_every_scorer(name, packed, lists_of):
    """Rows 80..119 point at the keys of block 4, far from sink and window."""
    q, k, _ = packed(160, 2, 1, dim=16, scale=0.3)
    k[32:40, 0] = 0
    k[32:40, 0, 3] = 6.0
    q[80:120, :, 3] = 6.0
    lists = lists_of(select(q, k, TIGHT, block=8, tile=8, score=name))
    for tile in range(10, 15):
        assert (4, 0) in lists[0, 0, tile]


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_by_name_by_object_and_by_function(name, packed):
    q, k, _ = packed(200, 4, 2, scale=2.0)
    options = {"block": 8, "tile": 8}
    by_name = select(q, k, TIGHT, score=name, **options)
    by_object = select(q, k, TIGHT, score=SCORERS[name], **options)

    def by_hand(q, blocks, hidden, scale):
        return SCORERS[name].rows(q, SCORERS[name].prepare(blocks), hidden, scale)

    by_function = select(q, k, TIGHT, score=by_hand, **options)
    for other in (by_object, by_function):
        assert torch.equal(by_name.columns, other.columns)
        assert torch.equal(by_name.entry, other.entry)
    assert isinstance(get_scorer(by_hand), Scorer)


def test_scorers_differ(packed):
    q, k, _ = packed(300, 4, 2, scale=3.0)
    columns = [select(q, k, TIGHT, block=8, tile=8, score=name).columns for name in SCORERS]
    for i, one in enumerate(columns):
        for other in columns[:i]:
            assert not torch.equal(one, other)


def test_a_callable_decides_and_sees_documented_shapes(packed, lists_of):
    q, k, _ = packed(200, 6, 2, dim=16)
    seen = []

    def latest(q, blocks, hidden, scale):
        heads, rows, groups, dim = q.shape
        seen.append((heads, groups, dim, blocks.shape[0], blocks.shape[2:], scale))
        assert hidden.shape == (rows, blocks.shape[1])
        return torch.arange(blocks.shape[1]).expand(heads, rows, -1).to(q.dtype)

    budget = Budget.fixed(64, sink=8, local=0.0, late=0.0)
    lists = lists_of(select(q, k, budget, scale=0.5, block=8, tile=8, score=latest))
    # 8 blocks: the sink, the window (18, 19), the diagonal (20) and the 4 last candidates.
    assert lists[0, 1, 20] == [(b, 0) for b in (0, 14, 15, 16, 17, 18, 19, 20)]
    assert set(seen) == {(2, 3, 16, 2, (8, 16), 0.5)}


def test_an_unknown_name_is_refused(packed):
    q, k, _ = packed(20, 4, 2)
    with pytest.raises(
        ValueError, match="score must be one of mass, mean, variance, minmax, exact"
    ):
        select(q, k, TIGHT, score="best")
