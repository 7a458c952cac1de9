"""What kernels read about tiles and blocks: a plan's arrays as two device tables, made once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention.plan import Plan, to_device

TILE_FIELDS = 16
"""int64 columns of the tile table, in the order of `Tables.tiles`."""

BLOCK_FIELDS = 8
"""int64 columns of the block table, in the order of `Tables.blocks`."""


@dataclass(frozen=True)
class Tables:
    """A plan on a device.

    Args:
        tiles: int64 [tiles, 16]: packed index of the first query, document position of it, rows
            that exist, packed index of the document's first key, keys of the document, start of
            the list, slots that every row sees, slots, the document's first block and first tile,
            blocks complete before the tile, slots of the sink, base slots, late slots, first block
            of the local window, 2 if its masses are needed (by it or the next tile) plus 1 if it
            drops anything.
        blocks: int64 [blocks, 8]: packed index of the first key, document position of it, keys of
            the document, packed index of the document's first query, its queries, its first tile;
            two unused.
    """

    tiles: Tensor
    blocks: Tensor


def tables(plan: Plan, device: torch.device) -> Tables:
    """The tables of a plan, from its cache if it was on this device before."""
    found = plan.cache.get(device)
    if found is None:
        found = Tables(to_device(_tile_table(plan), device), to_device(_block_table(plan), device))
        plan.cache[device] = found
    return found


def _tile_table(plan: Plan) -> np.ndarray:
    document = plan.document
    first_key = np.asarray(plan.keys[:-1], dtype=np.int64)
    needed_next = np.append(plan.sparse[1:] & (document[1:] == document[:-1]), False)
    columns = [
        plan.row_start,
        plan.start,
        plan.rows,
        first_key[document],
        np.diff(plan.keys)[document],
        plan.offsets[:-1],
        plan.full,
        np.diff(plan.offsets),
        plan.first_block[document],
        plan.first_tile[document],
        plan.complete,
        plan.counts[:, 0],
        plan.base,
        plan.late,
        plan.first_local,
        2 * (plan.sparse | needed_next) + plan.sparse,
    ]
    return np.stack(columns, axis=1).astype(np.int64)


def _block_table(plan: Plan) -> np.ndarray:
    blocks_of = np.diff(plan.first_block)
    document = np.repeat(np.arange(len(blocks_of)), blocks_of)
    index = np.arange(len(document)) - plan.first_block[document]
    first_key = np.asarray(plan.keys[:-1], dtype=np.int64)
    first_query = np.asarray(plan.queries[:-1], dtype=np.int64)
    table = np.zeros((len(document), BLOCK_FIELDS), dtype=np.int64)
    table[:, 0] = first_key[document] + index * plan.block
    table[:, 1] = index * plan.block
    table[:, 2] = np.diff(plan.keys)[document]
    table[:, 3] = first_query[document]
    table[:, 4] = np.diff(plan.queries)[document]
    table[:, 5] = plan.first_tile[document]
    return table
