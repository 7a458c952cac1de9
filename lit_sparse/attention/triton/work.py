"""Work items of dK/dV: the transposed lists, long ones cut into equal parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_sparse.attention.selection import Selection
from lit_sparse.attention.triton.tables import tables

ITEMS = 1024
"""Work items that a perfectly even selection would be cut into: several for each of the programs
that a large GPU runs at a time, and a constant, so that sums do not depend on the GPU."""

LEAST = 8
"""Tiles of a work item, at least: a part costs the writing and reading of its partial sums."""

ITEM_FIELDS = 5


@dataclass(frozen=True)
class Work:
    """What each program of dK/dV does.

    Args:
        lists: int32 [Hkv, slots], by key block, ascending: the first query of each tile that keeps
            the block, counted from the document's first.
        entries: int32 [Hkv, slots], the first query of that tile that sees the block, likewise.
        items: int64 [items, 5]: head, block (-1: nothing to do), first and last + 1 entry of the
            head's lists, and where the partial sums go (-1: this item is the whole column).
        columns: int64 [Hkv, blocks, 2]: first partial sum and how many, 0 for columns not cut.
        partials: how many partial sums there may be; their true number is known on the device.
    """

    lists: Tensor
    entries: Tensor
    items: Tensor
    columns: Tensor
    partials: int


def make_work(selection: Selection, size: int | None = None) -> Work:
    """The work items of a selection. No shape depends on data, so nothing waits for the device.

    Args:
        size: tiles of an item, at most; None: so that there are about `ITEMS`.
    """
    by_block = selection.transpose()
    heads, slots = by_block.tiles.shape
    blocks = by_block.offsets.shape[1] - 1
    size = size or max(-(-heads * slots // ITEMS), LEAST)
    device = by_block.tiles.device

    first = by_block.offsets[:, :-1].flatten()
    counts = by_block.offsets.diff(dim=1).flatten()
    parts = (counts + size - 1).div(size, rounding_mode="floor").clamp(min=1)
    cut = parts > 1
    partial_parts = torch.where(cut, parts, 0)
    first_partial = partial_parts.cumsum(0) - partial_parts
    end = parts.cumsum(0)

    most = heads * slots // size + heads * blocks
    item = torch.arange(most, device=device)
    column = torch.searchsorted(end, item, right=True).clamp(max=max(heads * blocks - 1, 0))
    part = item - (end - parts)[column]
    real = part < parts[column]
    begin = first[column] + counts[column] * part // parts[column]
    stop = first[column] + counts[column] * (part + 1) // parts[column]
    items = torch.stack(
        [
            column // max(blocks, 1),
            torch.where(real, column % max(blocks, 1), -1),
            begin,
            stop,
            torch.where(cut[column], first_partial[column] + part, -1),
        ],
        dim=1,
    )
    # Parts of long columns start first, or they would end last; the rest keeps its order, in which
    # neighbours read the same queries.
    # Then whole columns, by eighths of an item's length: a long one that starts last ends last.
    eighth = (stop - begin) * 8 // size
    later = torch.where(real, torch.where(cut[column], 0, 9 - eighth), 10)
    first_tile = tables(selection.plan, device).tiles[:, 9]
    start = (torch.arange(len(first_tile), device=device) - first_tile) * selection.tile
    lists = start.to(torch.int32)[by_block.tiles.clamp(min=0)]
    return Work(
        lists=lists,
        entries=lists + by_block.entry,
        items=items[later.argsort(stable=True)],
        columns=torch.stack([first_partial, partial_parts], dim=1).view(heads, blocks, 2),
        # A column that is cut has more than `size` tiles, and at most twice the parts of those.
        partials=min(2 * heads * slots // size, most),
    )
