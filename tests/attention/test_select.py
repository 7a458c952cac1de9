"""select() against the definition, and the definition against lists worked out by hand."""

import itertools
import random
import sys
import warnings

import pytest
import torch

from lit_sparse.attention import reference, select
from lit_sparse.attention.plan import late_rows
from lit_sparse.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")

# --- by hand ---------------------------------------------------------------------------------
# Blocks of 2 keys, tiles of 2 rows. A key is a unit vector of its block, and a query points at the
# blocks it wants; one row's masses are softmax weights, so the larger coordinate wins.
# At t0 = 12 (tile 6) there are 6 complete blocks and the window is w = tile + block = 4 keys:
# blocks 4 and 5 are local, 6 is the diagonal, block 0 is the sink, candidates are 1, 2 and 3.


def _pointing(wishes, tokens=14, blocks=7):
    """q, k of one head: key t is the unit vector of block t // 2; row t wants {block: strength}."""
    k = torch.eye(blocks, dtype=torch.float64).repeat_interleave(2, 0)[:tokens, None]
    q = torch.zeros(tokens, 1, blocks, dtype=torch.float64)
    for row, wanted in wishes.items():
        for block, strength in wanted.items():
            if row < tokens:
                q[row, 0, block] = strength
    return q, k


def _last_list(wishes, keys, late, lists_of, *, tokens=14, sink=1, local=0.0):
    q, k = _pointing(wishes, tokens)
    budget = Budget.fixed(keys, sink=sink, local=local, late=late)
    options = {"scale": 1.0, "block": 2, "tile": 2}
    lists = lists_of(select(q, k, budget, **options))
    assert lists == reference.select_blocks(q, k, budget, [tokens], **options)
    return lists[0, 0, (tokens - 1) // 2]


def test_base_is_what_the_rows_before_the_tile_and_its_first_row_needed(lists_of):
    # 10 keys are 5 blocks: 4 always kept, 1 to choose.
    always = [(0, 0), (4, 0), (5, 0), (6, 0)]
    options = {"keys": 10, "late": 0.0, "lists_of": lists_of}
    assert _last_list({10: {1: 5}}, **options) == sorted([*always, (1, 0)])
    assert _last_list({11: {2: 5}}, **options) == sorted([*always, (2, 0)])
    assert _last_list({12: {3: 5}}, **options) == sorted([*always, (3, 0)])
    # Rows 9 (a tile earlier) and 13 (later in the tile) have no say.
    assert _last_list({9: {1: 9}, 12: {3: 5}, 13: {2: 9}}, **options) == sorted([*always, (3, 0)])
    # Masses add up: two rows at half the strength beat one.
    both = {10: {2: 3}, 11: {2: 3}, 12: {3: 3.5}}
    assert _last_list(both, **options) == sorted([*always, (2, 0)])


def test_ties_go_to_the_lower_block(lists_of):
    always = [(0, 0), (4, 0), (5, 0), (6, 0)]
    assert _last_list({}, 10, 0.0, lists_of) == sorted([*always, (1, 0)])
    assert _last_list({12: {2: 5, 3: 5}}, 10, 0.0, lists_of) == sorted([*always, (2, 0)])
    assert _last_list({13: {2: 5, 3: 5}}, 10, 1.0, lists_of) == sorted([*always, (2, 1)])


def test_what_is_always_kept_takes_part_in_the_softmax(lists_of):
    # Row 12 gives nearly all its mass to the sink: what is left for block 3 is less than what two
    # undecided rows have for block 1.
    options = {"keys": 10, "late": 0.0, "lists_of": lists_of}
    undecided = {10: {1: 0.5}, 11: {1: 0.5}}
    assert (1, 0) in _last_list({**undecided, 12: {0: 9.0, 3: 6.0}}, **options)
    assert (3, 0) in _last_list({**undecided, 12: {3: 6.0}}, **options)
    # The same for the local window.
    assert (1, 0) in _last_list({**undecided, 12: {5: 9.0, 3: 6.0}}, **options)


def test_one_late_slot_is_asked_for_by_the_middle_row(lists_of):
    # late = 1: no base. The one slot is asked for at row (2 * 0 + 1) * 2 // 2 = 1, packed row 13.
    always = [(0, 0), (4, 0), (5, 0), (6, 0)]
    wishes = {10: {1: 9}, 11: {1: 9}, 12: {1: 9}, 13: {3: 4}}
    assert _last_list(wishes, 10, 1.0, lists_of) == sorted([*always, (3, 1)])
    # Without a row 13 nobody asks: the slot stays empty.
    assert _last_list(wishes, 10, 1.0, lists_of, tokens=13) == always


def test_late_rows_pick_outside_the_base_and_share(lists_of):
    # 12 keys are 6 blocks, 2 to choose: late = .5 is 1 late and 1 base, late = 1 is 2 late.
    always = [(0, 0), (4, 0), (5, 0), (6, 0)]
    wishes = {12: {2: 9}, 13: {2: 9, 1: 5}}
    assert _last_list(wishes, 12, 0.5, lists_of) == sorted([*always, (2, 0), (1, 1)])
    # Rows 0 and 1 ask for the same block: the earlier one brings it in, a slot is saved.
    same = {12: {3: 9}, 13: {3: 9}}
    assert _last_list(same, 12, 1.0, lists_of) == sorted([*always, (3, 0)])
    assert _last_list({12: {3: 9}, 13: {1: 9}}, 12, 1.0, lists_of) == sorted(
        [*always, (3, 0), (1, 1)]
    )


def test_local_share_widens_the_window(lists_of):
    # k - sink = 9 and local = .75: w = max(ceil(6.75), 4) = 7, from key 5 on, block 2.
    assert _last_list({}, 10, 0.0, lists_of, local=0.75) == [(b, 0) for b in (0, 2, 3, 4, 5, 6)]
    # w = ceil(.9 * 9) = 9, from key 3 on, block 1: everything visible is kept.
    assert _last_list({}, 10, 0.0, lists_of, local=0.9) == [(b, 0) for b in range(7)]
    # A sliding window of 6 keys without a sink.
    assert _last_list({}, 6, 0.0, lists_of, sink=0, local=1.0) == [(b, 0) for b in (3, 4, 5, 6)]
    # Without a sink and a local share: tile + block keys.
    assert _last_list({}, 2, 0.0, lists_of, sink=0) == [(b, 0) for b in (4, 5, 6)]


def test_a_sink_covers_whole_blocks(lists_of):
    assert _last_list({}, 2, 0.0, lists_of, sink=2) == [(b, 0) for b in (0, 4, 5, 6)]
    assert _last_list({}, 2, 0.0, lists_of, sink=3) == [(b, 0) for b in (0, 1, 4, 5, 6)]
    assert _last_list({}, 2, 0.0, lists_of, sink=500) == [(b, 0) for b in range(7)]


def test_masses_are_softmax_not_logits_and_add_over_the_heads_of_a_group(lists_of):
    # Head 0 spends all its mass on block 1 however strongly it asks; 1 and 2 both want block 3.
    q, k = _pointing({})
    q = q.repeat(1, 3, 1)
    q[12, 0, 1], q[12, 1, 3], q[12, 2, 3] = 900.0, 20.0, 20.0
    budget = Budget.fixed(10, sink=1, local=0.0, late=0.0)
    options = {"scale": 1.0, "block": 2, "tile": 2}
    lists = lists_of(select(q, k, budget, **options))
    assert lists[0, 0, 6] == [(b, 0) for b in (0, 3, 4, 5, 6)]
    by_logit = lists_of(select(q, k, budget, **options, score="mean"))
    assert by_logit[0, 0, 6] == [(b, 0) for b in (0, 1, 4, 5, 6)]
    assert lists == reference.select_blocks(q, k, budget, [14], **options)


def test_late_rows_are_evenly_spaced():
    assert late_rows(1, 16) == [8]
    assert late_rows(2, 16) == [4, 12]
    assert late_rows(4, 16) == [2, 6, 10, 14]
    assert late_rows(3, 16) == [2, 8, 13]
    assert late_rows(4, 2) == [0, 0, 1, 1]
    assert late_rows(3, 1) == [0, 0, 0]


# --- the same lists as the definition ----------------------------------------------------------

AXES = {
    "lengths": [
        [1],
        [63],
        [64],
        [65],
        [127],
        [129],
        [300],
        [0, 129, 0, 0, 65, 1, 0],
        [64, 128, 192],
        [0, 0],
        [200, 1, 63],
    ],
    "heads": [(4, 4), (3, 1), (4, 1), (7, 1), (8, 1), (6, 2), (1, 1)],
    "tiling": [(8, 4), (8, 8), (8, 32), (4, 16), (16, 1), (1, 8), (16, None), (64, 16)],
    "sink": [0, 8, 20, 400],
    "local": [0.0, 0.25, 1.0],
    "late": [0.0, 0.1, 0.25, 1.0],
    "law": [
        {"alpha": 3.0, "exponent": 0.5, "floor": 0},
        {"alpha": 60.0, "exponent": 0.0, "floor": 0},
        {"alpha": 0.4, "exponent": 1.0, "floor": 48},
        {"alpha": 6.0, "exponent": 0.5, "floor": 32, "ceiling": 80},
        {"alpha": 9.0, "exponent": 0.45, "floor": 0, "ceiling": 96},
    ],
    "scale": [1.0, 4.0, 16.0],
    "softmax_scale": [None, 0.7],
}


def _pairwise_cover(axes, seed=0):
    """Cases in which every pair of values of any two axes occurs, found greedily."""
    rng = random.Random(seed)
    names = list(axes)
    sizes = [len(axes[name]) for name in names]
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }

    def pairs(case):
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    cases = []
    while left:
        a, i, b, j = min(left)
        tries = []
        for _ in range(40):
            case = [rng.randrange(size) for size in sizes]
            case[a], case[b] = i, j
            tries.append((len(pairs(case) & left), case))
        best = max(tries)[1]
        left -= pairs(best)
        cases.append({name: axes[name][at] for name, at in zip(names, best, strict=True)})
    return cases


# The same with budgets well above what is always kept: lists with base and late slots.
ROOMY = {
    "lengths": [[127], [129], [300], [0, 129, 0, 0, 65, 1, 0], [64, 128, 192], [200, 1, 63]],
    "heads": AXES["heads"],
    "tiling": [(8, 4), (8, 8), (4, 16), (16, 1), (1, 8), (8, 16)],
    "sink": [0, 8, 20],
    "local": [0.0, 0.25],
    "late": [0.0, 0.1, 0.25, 0.5, 1.0],
    "law": [
        {"alpha": 88.0, "exponent": 0.0, "floor": 0},
        {"alpha": 8.0, "exponent": 0.5, "floor": 0},
        {"alpha": 0.6, "exponent": 1.0, "floor": 70},
        {"alpha": 30.0, "exponent": 0.25, "floor": 0, "ceiling": 90},
    ],
    "scale": [1.0, 4.0, 16.0],
    "softmax_scale": [None, 0.7],
}

ROOMY_CASES = _pairwise_cover(ROOMY)
CASES = _pairwise_cover(AXES) + ROOMY_CASES


@pytest.mark.parametrize("case", CASES, ids=[f"{i:03d}" for i in range(len(CASES))])
def test_equals_the_definition(case, packed, boundaries, lists_of):
    lengths, (hq, hkv), (block, tile) = case["lengths"], case["heads"], case["tiling"]
    q, k, _ = packed(sum(lengths), hq, hkv, dim=8, scale=case["scale"])
    budget = Budget(**case["law"], sink=case["sink"], local=case["local"], late=case["late"])
    options = {"scale": case["softmax_scale"], "block": block}
    selection = select(q, k, budget, boundaries(lengths), tile=tile, **options)
    tile = selection.tile if tile is None else tile
    assert selection.tile == tile
    expected = reference.select_blocks(q, k, budget, lengths, tile=tile, **options)
    assert lists_of(selection) == expected


def test_the_cover_reaches_base_and_late_slots(packed, boundaries):
    base, late, shared = 0, 0, 0
    for case in ROOMY_CASES:
        (hq, hkv), (block, tile) = case["heads"], case["tiling"]
        q, k, _ = packed(sum(case["lengths"]), hq, hkv, dim=8, scale=case["scale"])
        budget = Budget(**case["law"], sink=case["sink"], local=case["local"], late=case["late"])
        selection = select(q, k, budget, boundaries(case["lengths"]), block=block, tile=tile)
        base += bool(selection.plan.base.sum())
        late += bool(selection.plan.late.sum())
        shared += bool((selection.columns < 0).any())
    assert base > len(ROOMY_CASES) / 2
    assert late > len(ROOMY_CASES) / 2
    assert shared > len(ROOMY_CASES) / 4


@pytest.mark.parametrize(
    ("local", "late"), [(0.07, 0.0), (0.07, 0.29), (0.0, 0.29), (0.14, 0.58), (0.28, 0.57)]
)
def test_shares_are_the_decimals_that_were_written(local, late, packed, lists_of):
    """0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996 in floating point."""
    q, k, _ = packed(260, 1, 1, dim=4)
    for keys in (100, 102, 107, 109, 114):
        budget = Budget.fixed(keys, sink=0, local=local, late=late)
        selection = select(q, k, budget, block=1, tile=1)
        assert lists_of(selection) == reference.select_blocks(q, k, budget, [260], block=1, tile=1)


CACHED = {
    "one query": ([1], [300]),
    "one query each": ([1, 1, 1], [129, 1, 300]),
    "one query or none": ([1, 0, 1], [129, 40, 257]),
    "several queries": ([5], [300]),
    "several tiles": ([37, 20], [237, 20]),
    "unaligned": ([19, 0, 33], [150, 7, 140]),
    "a chunk after a full tile": ([64], [192]),
}


@pytest.mark.parametrize(("lengths", "key_lengths"), CACHED.values(), ids=CACHED.keys())
@pytest.mark.parametrize("tiling", [(8, 8), (8, 16), (16, 4)])
@pytest.mark.parametrize("late", [0.0, 0.3])
def test_cached_keys_equal_the_definition(
    lengths, key_lengths, tiling, late, packed, boundaries, lists_of
):
    block, tile = tiling
    q, k, _ = packed(sum(lengths), 4, 2, dim=8, keys=sum(key_lengths), scale=2.0)
    budget = Budget(alpha=6.0, exponent=0.5, floor=0, sink=8, local=0.2, late=late)
    selection = select(
        q, k, budget, boundaries(lengths), boundaries(key_lengths), block=block, tile=tile
    )
    assert selection.tile == (1 if max(lengths) == 1 else tile)
    options = {"key_lengths": key_lengths, "block": block, "tile": selection.tile}
    assert lists_of(selection) == reference.select_blocks(q, k, budget, lengths, **options)
    assert not selection.keeps_everything


def test_a_decoding_step_is_a_tile_of_one_row_and_scores_itself(packed, lists_of):
    q, k, _ = packed(300, 4, 2, dim=8, scale=2.0)
    budget = Budget.fixed(96, sink=8, local=0.0, late=0.0)
    options = {"block": 8, "tile": 1}
    whole = lists_of(select(q, k, budget, **options))
    step = lists_of(select(q[-1:], k, budget, [0, 1], [0, 300], block=8, tile=32))
    # The step has no row before it to listen to, so it equals the definition of that row alone.
    alone = reference.select_blocks(q[-1:], k, budget, [1], key_lengths=[300], **options)
    assert step == alone
    assert {len(blocks) for (_, _, t), blocks in whole.items() if t == 299} == {
        len(blocks) for blocks in step.values()
    }


@pytest.mark.parametrize(
    ("groups", "tile"), [(1, 64), (2, 64), (3, 32), (4, 32), (7, 16), (8, 16), (16, 16)]
)
def test_default_tile_packs_about_128_rows(groups, tile, packed):
    q, k, _ = packed(70, groups, 1, dim=4)
    assert select(q, k, Budget()).tile == tile


def test_default_block_and_budget_are_dense_below_the_floor(packed, lists_of):
    q, k, _ = packed(1000, 2, 2, dim=4)
    selection = select(q, k, Budget())
    assert selection.block == 64
    assert selection.keeps_everything
    assert lists_of(selection)[0, 0, 15] == [(b, 0) for b in range(16)]


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 100_000])
def test_strips_are_an_implementation_detail(
    strip_bytes, packed, boundaries, lists_of, monkeypatch
):
    q, k, _ = packed(500, 4, 2, dim=8, scale=3.0)
    budget = Budget(alpha=6.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.3)
    arguments = (q, k, budget, boundaries([300, 200]))
    expected = lists_of(select(*arguments, block=8, tile=8))
    module = sys.modules[select.__wrapped__.__module__]
    monkeypatch.setattr(module, "_STRIP_BYTES", strip_bytes)
    assert lists_of(select(*arguments, block=8, tile=8)) == expected


def test_a_budget_below_what_is_always_kept_warns_once_with_the_effective_minimum(packed):
    q, k, _ = packed(300, 4, 2, dim=8)
    budget = Budget(alpha=1.0, exponent=0.25, floor=0, sink=20, local=0.0, late=0.2)
    # sink: 3 blocks of 8; tile + block = 24 keys before the tile: 3 blocks; the tile itself: 2.
    with pytest.warns(UserWarning, match="effective minimum is 64 keys") as caught:
        select(q, k, budget, block=8, tile=16)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(q, k, budget, block=8, tile=16)
        select(q, k, Budget.fixed(64, sink=20, local=0.0), block=8, tile=16)
        select(q, k, Budget(), block=8, tile=16)


def test_takes_boundaries_as_tensor_list_or_nothing(packed):
    q, k, _ = packed(300, 4, 2, dim=8)
    budget = Budget.fixed(80, sink=8, local=0.1)
    options = {"block": 8, "tile": 8}
    by_list = select(q, k, budget, [0, 100, 300], **options)
    for cu_seqlens in (
        torch.tensor([0, 100, 300], dtype=torch.int32),
        torch.tensor([0, 100, 300]),
        (0, 100, 300),
        torch.tensor([0, 100, 300]).numpy(),
    ):
        again = select(q, k, budget, cu_seqlens, **options)
        assert torch.equal(again.columns, by_list.columns)
        assert again.cu_seqlens.tolist() == [0, 100, 300]
        assert again.cu_seqlens.dtype == torch.int32
    whole = select(q, k, budget, **options)
    assert torch.equal(whole.columns, select(q, k, budget, [0, 300], **options).columns)
    assert whole.cu_seqlens.tolist() == [0, 300]
