"""The GPU selection: the lists of the CPU, from the same scores and from the same tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import _choose_strip
from lit_sparse.attention.triton import select as launches
from lit_sparse.attention.triton.choose import choose_kernel
from lit_sparse.attention.triton.select import strips
from lit_sparse.attention.triton.tables import TILE_FIELDS, tables
from lit_sparse.budget import Budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below what is always kept"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TIGHT = Budget(alpha=5.0, exponent=0.5, floor=0, sink=16, local=0.1, late=0.3)
BUDGETS = {
    "tight": TIGHT,
    "no late": Budget(alpha=6.0, exponent=0.5, floor=0, sink=16, local=0.1, late=0.0),
    "all late": Budget(alpha=6.0, exponent=0.5, floor=0, sink=16, local=0.1, late=1.0),
    "no sink": Budget(alpha=5.0, exponent=0.5, floor=0, sink=0, local=0.0, late=0.3),
    "wide sink": Budget(alpha=7.0, exponent=0.5, floor=0, sink=40, local=0.1, late=0.3),
    "sliding": Budget.fixed(40, sink=0, local=1.0),
    "everything": Budget.dense(),
}


def _both(q, k, budget, cu_seqlens=None, cu_seqlens_k=None, **options):
    """The selection by PyTorch and by Triton. A GPU's rounds logits otherwise: in float32."""
    chosen = [
        select(x.float(), y.float(), budget, cu_seqlens, cu_seqlens_k, backend="torch", **options)
        if backend == "torch"
        else select(x, y, budget, cu_seqlens, cu_seqlens_k, backend="triton", **options)
        for backend, x, y in (("torch", q, k), ("triton", q, k))
    ]
    return chosen


def _same(one, other):
    return torch.equal(one.columns, other.columns) and torch.equal(one.entry, other.entry)


@pytest.fixture
def precise(device):
    """float32 where the kernels take it; lists are compared entry by entry only there."""
    if device != "cpu":
        pytest.skip("kernels take float32 in the interpreter alone")
    return torch.float32


SHAPES = [
    ((4, 1), 16, [260]),
    ((3, 1), 8, [0, 100, 0, 1, 30, 0]),
    ((16, 1), 16, [180]),
    ((2, 2), 32, [200]),
]
CASES = [(budget, *SHAPES[0]) for budget in BUDGETS]
CASES += [(budget, *shape) for budget in ("tight", "all late", "no sink") for shape in SHAPES[1:]]


@pytest.mark.parametrize(("law", "heads", "tile", "lengths"), CASES, ids=str)
def test_lists_of_the_cpu(law, heads, tile, lengths, draw, precise):
    q, k, _ = draw(sum(lengths), *heads, 64, precise)
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    torch_lists, ours = _both(q, k, BUDGETS[law], cu_seqlens, block=16, tile=tile)
    assert _same(torch_lists, ours)


def test_cached_keys(draw, precise):
    q, k, _ = draw(40, 4, 2, 64, precise, keys=500)
    torch_lists, ours = _both(q, k, TIGHT, [0, 1, 40], [0, 200, 500], block=16, tile=16)
    assert not ours.keeps_everything
    assert _same(torch_lists, ours)
    torch_lists, ours = _both(q[:1], k[:400], TIGHT, [0, 1], [0, 400], block=16)
    assert ours.tile == 1
    assert _same(torch_lists, ours)


def test_lists_of_a_window(draw, precise):
    """Lengths decide alone: every head has one list, from one kernel."""
    q, k, v = draw(200, 4, 2, 16, precise)
    bounds, window = [0, 150, 200], 20
    options = {"block": 16, "tile": 16, "window": window}
    by_torch, ours = _both(q, k, TIGHT, bounds, **options)
    assert _same(by_torch, ours)
    assert len(ours.columns) == 2
    given = {"window": window, "backend": "triton"}
    out = sparse_attention(q, k, v, ours, **given)[0]
    expected = sparse_attention(q, k, v, by_torch, window=window, backend="reference")[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_strips_cut_nothing_but_memory(draw, precise, monkeypatch):
    q, k, _ = draw(260, 2, 1, 16, precise)
    bounds, budget = [0, 150, 260], replace(TIGHT, alpha=9.0)
    whole = select(q, k, budget, bounds, block=16, tile=16, backend="triton")
    assert whole.plan.chooses
    found = []

    def short(plan, row_bytes, limit):
        found.extend(strips(plan, row_bytes, 300))
        return found

    monkeypatch.setattr(launches, "strips", short)
    assert _same(whole, select(q, k, budget, bounds, block=16, tile=16, backend="triton"))
    assert len(found) >= 4


def test_strips_hold_every_sparse_tile_once_and_the_tile_before_it():
    bounds = (0, 700, 700, 900, 1900)
    plan = make_plan(bounds, bounds, TIGHT, 16, 16)
    for limit in (1, 3000, 10**9):
        found = strips(plan, 12, limit)
        chosen = [tile for strip in found for tile in range(strip.first, strip.stop)]
        assert set(np.flatnonzero(plan.sparse)) <= set(chosen)
        assert chosen == sorted(set(chosen))
        for strip in found:
            assert strip.before == max(strip.first - 1, 0)
            assert strip.width == plan.complete[strip.before : strip.stop].max()
            cost = (strip.stop - strip.before) * strip.width * 12
            assert cost <= limit or strip.stop == strip.first + 1


def test_alone_or_packed_bit_for_bit(draw, half):
    q, k, _ = draw(230, 4, 2, 16, half)
    packed = select(q, k, TIGHT, [0, 50, 50, 230], block=16, tile=16, backend="triton")
    alone = select(q[50:], k[50:], TIGHT, block=16, tile=16, backend="triton")
    slots = alone.columns.shape[1]
    assert torch.equal(packed.columns[:, -slots:], alone.columns)
    assert torch.equal(packed.entry[:, -slots:], alone.entry)


@pytest.mark.parametrize("position", [0, 7, 15])
def test_nothing_after_a_position_changes_anything_up_to_it(position, draw, half):
    """For a first, an inner and the last row of a tile, selection and output, bit for bit."""
    q, k, v = draw(176, 2, 1, 16, half)
    position += 128

    def attend():
        selection = select(q, k, TIGHT, block=16, tile=16, backend="triton")
        return sparse_attention(q, k, v, selection, backend="triton")

    before = attend()
    for x, y in zip((q, k, v), draw(176, 2, 1, 16, half, seed=5, scale=3.0), strict=True):
        x[position + 1 :] = y[position + 1 :]
    after = attend()
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[: position + 1], other[: position + 1])
        assert not torch.equal(one[position + 1 :], other[position + 1 :])


BROKEN = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("where", ["one query head", "one key", "everything"])
def test_broken_activations_give_well_formed_lists(value, where, draw, precise):
    q, k, v = draw(200, 2, 1, 16, precise)
    if where == "one query head":
        q[150, 1] = value
    elif where == "one key":
        k[20] = value
    else:
        q[:], k[:] = value, value
    torch_lists, ours = _both(q, k, TIGHT, block=16, tile=16)
    assert _same(torch_lists, ours)
    sparse_attention(q, k, v, ours, backend="triton")


@pytest.mark.parametrize(
    ("levels", "late", "span"),
    [(1, 0.3, 32), (3, 0.3, 64), (3, 0.0, 32), (3, 1.0, 64), (1, 1.0, 64), (1000, 0.3, 32)],
)
def test_the_same_lists_from_the_same_scores(levels, late, span, device):
    """Ties of all kinds: with one level all masses are equal, with three most. All late: more slots
    than a tile has rows. A span of 32 is less than there are blocks.
    """
    tile, chunks = 16, 2
    budget = Budget(alpha=20.0, exponent=0.5, floor=0, sink=32, local=0.1, late=late)
    plan = make_plan((0, 960), (0, 960), budget, 16, tile)
    first, stop = plan.tiles - 2, plan.tiles
    width = int(plan.complete[stop - 1])
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (1, 3, tile, width), generator=generator) / 1024
    # What lies beyond a tile's complete blocks is not scored.
    visible = torch.from_numpy(plan.complete[first - 1 : stop])[:, None, None]
    scores = torch.where(torch.arange(width) < visible, scores, 0.0).to(device)

    recent = scores[:, :-1].sum(2)
    base, columns, entry = _choose_strip(scores[:, 1:], recent, plan, first, stop)

    asked = 1 + min(int(plan.late.max()), tile)
    masses = torch.full((1, 3, asked, width), float("nan"), device=device)
    masses[:, :, 0] = scores[:, :, 0]
    for index in range(first - 1, stop):
        slots = int(plan.late[index])
        for slot in range(slots):
            row = (2 * slot + 1) * tile // (2 * slots)
            place = row if slots > tile else slot
            masses[:, index - first + 1, 1 + place] = scores[:, index - first + 1, row]
    sums = scores.unflatten(2, (chunks, -1)).sum(3).contiguous()
    ours = torch.full((1, int(plan.offsets[-1])), -7, dtype=torch.int32, device=device)
    entries = torch.full_like(ours, -7)
    choose_kernel[(3, 1)](
        sums, masses, ours, entries, tables(plan, torch.device(device)).tiles, first - 1, 3, width,
        asked, 1, ours.shape[1], TILE_FIELDS, tile, chunks, span, -(-width // span), 64,
    )  # fmt: skip

    begin = int(plan.offsets[first])
    of_base, of_late = (
        slots[slots >= begin].to(device) for slots in (plan.base_slots, plan.late_slots)
    )
    assert torch.equal(ours[:, of_base], base)
    assert torch.equal(ours[:, of_late], columns)
    assert torch.equal(entries[:, of_late], entry)
    # Nothing else is touched.
    ours[:, of_base], ours[:, of_late] = -7, -7
    assert (ours == -7).all()


def test_what_it_cannot_select_is_refused(draw, half, device):
    q, k, _ = draw(200, 4, 2, 64, half)
    with pytest.raises(ValueError, match="score='minmax' has no Triton kernel"):
        select(q, k, TIGHT, block=16, score="minmax", backend="triton")
    with pytest.raises(ValueError, match="blocks of 16 keys or more"):
        select(q, k, TIGHT, block=8, backend="triton")
    with pytest.raises(ValueError, match="must be 'triton' or 'torch'"):
        select(q, k, TIGHT, backend="cuda")
