"""Transposed lists and the work items they are cut into."""

import pytest
import torch

from lit_sparse.attention import select
from lit_sparse.attention.triton.work import make_work
from lit_sparse.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")

TIGHT = Budget(alpha=5.0, exponent=0.5, floor=0, sink=16, local=0.1, late=0.3)


@pytest.mark.parametrize("size", [1, 3, 1000, None])
@pytest.mark.parametrize("lengths", [[300], [0, 150, 1, 0, 90], [0], [16, 16]])
def test_items_are_the_selection_by_key_block(size, lengths):
    tokens, cu_seqlens = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k = torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 16)
    selection = select(q, k, TIGHT, cu_seqlens, block=16, tile=16)
    plan, work = selection.plan, make_work(selection, size)

    expected: dict = {}
    for head in range(2):
        for tile in range(plan.tiles):
            document = plan.document[tile]
            start = (tile - plan.first_tile[document]) * plan.tile
            for slot in range(plan.offsets[tile], plan.offsets[tile + 1]):
                column = int(selection.columns[head, slot])
                if column >= 0:
                    pair = (start, start + int(selection.entry[head, slot]))
                    block = plan.first_block[document] + column
                    expected.setdefault((head, int(block)), []).append(pair)
    blocks = int(plan.first_block[-1])

    found: dict = {}
    used = []
    real = [item for item in work.items.tolist() if item[1] >= 0]
    for head, block, begin, end, partial in real:
        pairs = torch.stack([work.lists[head, begin:end], work.entries[head, begin:end]], 1)
        found.setdefault((head, block), []).append((begin, partial, pairs.tolist()))
        assert size is None or end - begin <= size
    assert set(found) == {(head, block) for head in range(2) for block in range(blocks)}
    for (head, block), parts in found.items():
        parts.sort()
        pairs = [tuple(pair) for _, _, pairs in parts for pair in pairs]
        assert pairs == expected.get((head, block), [])
        partials = [partial for _, partial, _ in parts]
        first, count = work.columns[head, block].tolist()
        if len(parts) == 1:
            assert partials == [-1]
            assert count == 0
        else:
            assert partials == list(range(first, first + count))
            assert max(len(p) for *_, p in parts) - min(len(p) for *_, p in parts) <= 1
            used += partials
    assert sorted(used) == list(range(len(used)))
    assert len(used) <= work.partials

    # Parts of long columns come first, what is no item last.
    kinds = [2 if item[1] < 0 else int(item[4] < 0) for item in work.items.tolist()]
    assert kinds == sorted(kinds)


def test_a_hot_column_is_cut_and_an_even_selection_is_not():
    q, k = torch.randn(4096, 2, 16), torch.randn(4096, 1, 16)
    selection = select(q, k, Budget(4, 0.5, floor=0, sink=16), block=16, tile=16)
    work = make_work(selection, 40)
    parts = work.columns[0, :, 1]
    assert parts[0] >= 256 // 40
    assert parts[1:].eq(0).float().mean() > 0.9
