"""CPU backend: gathered tiles through ATen's flash kernel, forward and backward.

A tile's rows (its queries, of all heads of the group) against its kept keys are one small dense
attention, so tiles with equally long lists go through PyTorch's own kernel as a batch, at the same speed
per operation as dense attention. The blocks that every row sees whole need no mask; the late and the
diagonal ones do, in a second call. The two merge by their log-sum-exps; the backward takes the merged
log-sum-exp and output for both, which makes their gradients add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention.layout import from_key_blocks, from_query_tiles, key_blocks, query_tiles
from lit_sparse.attention.selection import Selection

_CHUNK_BYTES = 6 * 2**20
"""Gathered keys and values that exist at a time: they should stay in the cache between the two reads."""


@dataclass(frozen=True)
class _Chunk:
    """Tiles, of any head, whose lists are cut alike.

    Args:
        items: int64 [N], head * tiles + tile.
        parts: pairs of the gathered blocks int64 [N, B] (head * blocks + block) and their additive mask
            [N, G * tile, B * block], None where all rows see all keys.
    """

    items: Tensor
    parts: list[tuple[Tensor, Tensor | None]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq]; see `sparse_attention` for the arguments."""
    plan, groups = selection.plan, q.shape[1] // k.shape[1]
    tiles, keys, values = _flat(query_tiles(q, plan, groups)), _flat(key_blocks(k, plan)), _flat(key_blocks(v, plan))
    out = torch.empty_like(tiles)
    lse = torch.empty(tiles.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for chunk in _chunks(selection, groups, q):
        rows = tiles[chunk.items]
        results = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[None], _gather(keys, blocks), _gather(values, blocks), 0.0, False, attn_mask=mask, scale=scale
            )
            for blocks, mask in chunk.parts
        ]
        part_out, part_lse = results[0][0][0], results[0][1][0]
        for other_out, other_lse in results[1:]:
            part_out, part_lse = _merge(part_out, part_lse, other_out[0], other_lse[0])
        out[chunk.items], lse[chunk.items] = part_out, part_lse
    heads = k.shape[1]
    lse_rows = from_query_tiles(lse.view(heads, plan.tiles, -1, 1), plan, groups)
    return from_query_tiles(out.view(heads, plan.tiles, *out.shape[1:]), plan, groups), lse_rows[..., 0]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    plan, groups, heads = selection.plan, q.shape[1] // k.shape[1], k.shape[1]
    tiles, grads, outs = (_flat(query_tiles(x, plan, groups)) for x in (q, grad_out, out))
    lses = _flat(query_tiles(lse[..., None], plan, groups))[..., 0]
    key_grid = key_blocks(k, plan)
    keys, values = _flat(key_grid), _flat(key_blocks(v, plan))
    grad_tiles = torch.zeros_like(tiles)
    # Sums over many tiles: kept in float32 even where the inputs are shorter.
    sums = torch.promote_types(q.dtype, torch.float32)
    grad_keys, grad_values = torch.zeros_like(keys, dtype=sums), torch.zeros_like(values, dtype=sums)
    for chunk in _chunks(selection, groups, q):
        for blocks, mask in chunk.parts:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads[chunk.items][None],
                tiles[chunk.items][None],
                _gather(keys, blocks),
                _gather(values, blocks),
                outs[chunk.items][None],
                lses[chunk.items][None],
                0.0,
                False,
                attn_mask=mask,
                scale=scale,
            )
            grad_tiles[chunk.items] += dq[0]
            grad_keys.index_add_(0, blocks.flatten(), dk.reshape(-1, *keys.shape[1:]).to(sums))
            grad_values.index_add_(0, blocks.flatten(), dv.reshape(-1, *values.shape[1:]).to(sums))
    return (
        from_query_tiles(grad_tiles.view(heads, plan.tiles, *tiles.shape[1:]), plan, groups),
        from_key_blocks(grad_keys.view(key_grid.shape), plan).to(k.dtype),
        from_key_blocks(grad_values.view(key_grid.shape), plan).to(v.dtype),
    )


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _gather(blocks: Tensor, index: Tensor) -> Tensor:
    """blocks [A, block, D] at index [N, B] as [1, N, B * block, D]."""
    return blocks.index_select(0, index.flatten()).view(1, len(index), -1, blocks.shape[-1])


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, other_lse)
    mine, theirs = (lse - total).exp()[..., None], (other_lse - total).exp()[..., None]
    return (out * mine + other_out * theirs).to(out.dtype), total


def _chunks(selection: Selection, groups: int, q: Tensor) -> Iterator[_Chunk]:
    """All (head, tile) pairs, those of like lists together, in a fixed order."""
    plan, heads = selection.plan, len(selection.columns)
    total_blocks = int(plan.first_block[-1])
    first_block = torch.from_numpy(plan.first_block[plan.document])
    shapes = np.stack([plan.full, np.diff(plan.offsets)], axis=1)
    for whole, size in np.unique(shapes, axis=0).tolist():
        tiles = torch.from_numpy(np.flatnonzero((shapes == (whole, size)).all(1)))
        per_item = max(whole * plan.block * q.shape[-1] * q.element_size() * 2, 1)
        count = max(_CHUNK_BYTES // per_item, 2)
        items = (torch.arange(heads)[:, None] * plan.tiles + tiles).flatten()
        for part in items.split(count):
            head, tile = part // plan.tiles, part % plan.tiles
            slots = selection.offsets[tile][:, None] + torch.arange(size)
            columns = selection.columns[head[:, None], slots].long()
            start = head * total_blocks + first_block[tile]
            blocks = columns.clamp(min=0) + start[:, None]
            parts: list[tuple[Tensor, Tensor | None]] = []
            if whole:
                parts.append((blocks[:, :whole], None))
            if size > whole:
                entry = selection.entry[head[:, None], slots[:, whole:]]
                mask = _mask(selection, tile, columns[:, whole:], entry, groups, q.dtype)
                parts.append((blocks[:, whole:], mask))
            yield _Chunk(part, parts)


def _mask(
    selection: Selection, tile: Tensor, columns: Tensor, entry: Tensor, groups: int, dtype: torch.dtype
) -> Tensor:
    """Additive mask [1, N, G * tile, B * block] of late and diagonal blocks."""
    plan = selection.plan
    row = torch.arange(plan.tile)
    position = torch.from_numpy(plan.start)[tile][:, None] + row
    key = (columns[..., None] * plan.block + torch.arange(plan.block)).flatten(1)
    seen = key[:, None, :] <= position[:, :, None]
    seen &= (row[:, None] >= entry[:, None, :]).repeat_interleave(plan.block, -1)
    # Padding rows past the document's end are dropped, but must not be empty.
    seen |= (row >= torch.from_numpy(plan.rows)[tile][:, None])[..., None]
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return bias.repeat(1, groups, 1)[None]
