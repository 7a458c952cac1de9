"""What a Selection says about itself, against its mask."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lit_sparse.attention import select, sparse_attention
from lit_sparse.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")

TIGHT = Budget(alpha=6.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.4)

CASES = {
    "one": ([300], None, 8, 8),
    "packed": ([0, 129, 0, 65, 1, 100, 0], None, 8, 4),
    "small blocks": ([200, 77], None, 4, 16),
    "large blocks": ([250, 31], None, 16, 8),
    "cached": ([19, 0, 33], [150, 7, 140], 8, 8),
    "one query": ([1, 1], [250, 90], 8, 8),
    "dense": ([40, 7], None, 8, 16),
    "nothing": ([0, 0], None, 8, 8),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def selection(request, packed, boundaries):
    lengths, key_lengths, block, tile = request.param
    q, k, _ = packed(sum(lengths), 4, 2, keys=sum(key_lengths or lengths), scale=2.0)
    cu_k = boundaries(key_lengths) if key_lengths else None
    return select(q, k, TIGHT, boundaries(lengths), cu_k, block=block, tile=tile)


def _documents(selection):
    queries, keys = selection.cu_seqlens.tolist(), selection.cu_seqlens_k.tolist()
    return zip(queries, queries[1:], keys, keys[1:], strict=False)


def _mask_by_hand(selection, lists_of):
    mask = torch.zeros(
        len(selection.columns), selection.cu_seqlens[-1], selection.cu_seqlens_k[-1]
    ).bool()
    documents = list(_documents(selection))
    for (document, head, tile), blocks in lists_of(selection).items():
        q0, q1, k0, k1 = documents[document]
        context = (k1 - k0) - (q1 - q0)
        for row in range(selection.tile):
            query = tile * selection.tile + row
            if query >= q1 - q0:
                break
            for block, entry in blocks:
                for key in range(block * selection.block, (block + 1) * selection.block):
                    if row >= entry and key <= context + query:
                        mask[head, q0 + query, k0 + key] = True
    return mask


def test_to_mask_by_hand(selection, lists_of):
    assert torch.equal(selection.to_mask(), _mask_by_hand(selection, lists_of))


def test_density_counts_the_mask(selection):
    causal = sum(
        int(torch.ones(q1 - q0, k1 - k0).tril((k1 - k0) - (q1 - q0)).sum())
        for q0, q1, k0, k1 in _documents(selection)
    )
    expected = selection.to_mask().sum().item() / (2 * causal) if causal else 1.0
    assert selection.density == pytest.approx(expected, rel=1e-12)
    assert isinstance(selection.density, float)


def test_offsets_cover_the_slots(selection):
    offsets = selection.offsets
    assert offsets.dtype == torch.int64
    assert offsets[0] == 0
    assert offsets[-1] == selection.columns.shape[1]
    assert (offsets.diff() >= 1).all()
    assert selection.columns.dtype == selection.entry.dtype == torch.int32
    assert selection.columns.shape == selection.entry.shape
    assert selection.columns.is_contiguous()
    assert selection.slot_tile.tolist() == [
        tile for tile, size in enumerate(offsets.diff().tolist()) for _ in range(size)
    ]


def test_lists_stand_in_their_order(selection):
    """Sink, base and local blocks ascending and seen by all; then late ones; then the diagonal."""
    plan, offsets = selection.plan, selection.offsets.tolist()
    for tile in range(plan.tiles):
        full, late = int(plan.full[tile]), int(plan.late[tile])
        for head in range(2):
            columns = selection.columns[head, offsets[tile] : offsets[tile + 1]].tolist()
            entry = selection.entry[head, offsets[tile] : offsets[tile + 1]].tolist()
            assert columns[:full] == sorted(set(columns[:full]))
            assert all(b < plan.complete[tile] for b in columns[: full + late])
            assert all(b >= 0 for b in columns[:full])
            assert not any(entry[:full])
            diagonal = range(int(plan.complete[tile]), int(plan.complete[tile]) + len(columns))
            assert columns[full + late :] == list(diagonal)[: len(columns) - full - late]
            assert not any(entry[full + late :])


def test_rows_mask_numbers_keys_within_the_document(selection):
    mask, keys = selection.to_mask(), int(np.diff(selection.plan.keys).max()) + 5
    total = int(selection.cu_seqlens[-1])
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:60]
    found = selection.rows_mask(rows, keys)
    assert found.shape == (2, len(rows), keys)
    for q0, q1, k0, k1 in _documents(selection):
        for i, row in enumerate(rows.tolist()):
            if q0 <= row < q1:
                assert torch.equal(found[:, i, : k1 - k0], mask[:, row, k0:k1])
                assert not found[:, i, k1 - k0 :].any()
    assert torch.equal(selection.rows_mask(rows, 3), found[..., :3])


def test_entry_table(selection, lists_of):
    table = selection.entry_table()
    blocks = max((-(-(k1 - k0) // selection.block) for *_, k0, k1 in _documents(selection)))
    assert table.shape == (2, selection.plan.tiles, blocks)
    assert table.dtype == torch.int16
    expected = torch.full_like(table, selection.tile)
    first = {d: int(t) for d, t in enumerate(selection.plan.first_tile)}
    for (document, head, tile), entries in lists_of(selection).items():
        for block, entry in entries:
            expected[head, first[document] + tile, block] = entry
    assert torch.equal(table, expected)


def test_transpose_by_brute_force(selection):
    plan, transposed = selection.plan, selection.transpose()
    offsets = selection.offsets.tolist()
    for head in range(2):
        expected = {b: [] for b in range(int(plan.first_block[-1]))}
        for tile in range(plan.tiles):
            first = int(plan.first_block[plan.document[tile]])
            for slot in range(offsets[tile], offsets[tile + 1]):
                if selection.columns[head, slot] >= 0:
                    entry = int(selection.entry[head, slot])
                    expected[first + int(selection.columns[head, slot])].append((tile, entry))
        starts = transposed.offsets[head].tolist()
        assert len(starts) == len(expected) + 1
        tiles, entry = transposed.tiles[head].tolist(), transposed.entry[head].tolist()
        for block, pairs in expected.items():
            piece = slice(starts[block], starts[block + 1])
            assert list(zip(tiles[piece], entry[piece], strict=True)) == pairs
            assert tiles[piece] == sorted(tiles[piece])
        assert all(tile == -1 for tile in tiles[starts[-1] :])
        assert len(tiles) == selection.columns.shape[1]


def test_each_selection_owns_its_lists(packed):
    """Two selections of the same lengths share a plan: one must not overwrite the other's lists."""
    for heads in ((2, 1), (4, 2)):
        q, k, _ = packed(300, *heads, scale=2.0)
        selection = select(q, k, TIGHT, block=8, tile=8)
        columns, entry = selection.columns.clone(), selection.entry.clone()
        other = select(-q, k, TIGHT, block=8, tile=8)
        assert not torch.equal(other.columns, columns)
        assert torch.equal(selection.columns, columns)
        assert torch.equal(selection.entry, entry)


@pytest.mark.parametrize(
    ("lengths", "tiling", "heads"),
    [
        ([128], (16, 16), (4, 2)),
        ([64, 0, 192, 32], (16, 32), (2, 2)),
        ([160, 160], (32, 16), (3, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
def test_block_mask_through_flex_attention(lengths, tiling, heads, packed, boundaries):
    q, k, v = packed(sum(lengths), *heads, dtype=torch.float32)
    block, tile = tiling
    budget = Budget.fixed(96, sink=8, local=0.0, late=0.5)
    selection = select(q, k, budget, boundaries(lengths), block=block, tile=tile)
    assert not selection.keeps_everything
    groups = heads[0] // heads[1]
    block_mask = selection.to_block_mask(groups)
    expected, _ = sparse_attention(q, k, v, selection, backend="cpu")
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    out = flex_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=block_mask)
    torch.testing.assert_close(out[0].transpose(0, 1), expected, rtol=2e-5, atol=2e-5)


def test_block_mask_says_which_blocks_need_its_mask(packed):
    q, k, _ = packed(256, 4, 2, scale=2.0)
    budget = Budget.fixed(96, sink=8, local=0.0, late=0.5)
    selection = select(q, k, budget, [0, 128, 256], block=16, tile=16)
    assert selection.density < 0.9
    block_mask = selection.to_block_mask()
    # [Hkv, tiles, tile, blocks, block]
    pieces = selection.to_mask().unflatten(2, (-1, 16)).unflatten(1, (-1, 16))
    some, all_ = pieces.any((2, 4)), pieces.all(4).all(2)
    for number, indices, expected in (
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, all_),
        (block_mask.kv_num_blocks, block_mask.kv_indices, some & ~all_),
    ):
        for head in range(2):
            for tile in range(16):
                listed = indices[0, head, tile, : number[0, head, tile]].tolist()
                wanted = expected[head, tile].nonzero()[:, 0].tolist()
                assert listed == wanted


def test_block_mask_needs_aligned_documents_of_their_own_keys(packed):
    q, k, _ = packed(160, 4, 2)
    for cu_seqlens in ([0, 40, 160], [0, 16, 160]):
        unaligned = select(q, k, TIGHT, cu_seqlens, block=16, tile=32)
        with pytest.raises(ValueError, match="multiples of 32"):
            unaligned.to_block_mask()
    select(q, k, TIGHT, [0, 32, 160], block=16, tile=32).to_block_mask()
    with pytest.raises(ValueError, match="multiples of 16"):
        select(q[:100], k[:100], TIGHT, block=16, tile=16).to_block_mask()
    cached = select(q[:32], k, TIGHT, [0, 32], [0, 160], block=16, tile=16)
    with pytest.raises(ValueError, match="keys of a document to be its queries"):
        cached.to_block_mask()
