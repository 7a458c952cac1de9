"""CPU backend: gathered tiles as small dense attentions, by batched matrix products.

A tile's rows (its queries, of all heads of the group) against its kept keys are one small dense
attention, and tiles with equally long lists are a batch of them. Few tiles a thread are in work at
a time, so that their logits stay in that core's cache from one product to the next. Logits are in
units of log 2, because exp2 costs a quarter of exp in PyTorch's CPU kernels. Only the last keys of
a list, those of the late and diagonal blocks, need a mask; under a window all of them do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention.layout import from_key_blocks, from_query_tiles, key_blocks, query_tiles
from lit_sparse.attention.options import Options
from lit_sparse.attention.selection import Selection

_LOG2E = math.log2(math.e)

_CACHED_LOGITS = 2**17
"""Logits of one thread that stay in its core's cache from one product to the next."""

_BATCH_BYTES = 8 * 2**20
"""Masks and rows that are prepared at a time, for many steps of a few tiles."""


@dataclass(frozen=True)
class _Batch:
    """Tiles, of any head, whose lists are cut alike.

    Args:
        items: int64 [N], head * tiles + tile.
        blocks: int64 [N, B], the kept blocks, head * blocks + block.
        whole: keys at the head of each list that every row sees.
        mask: additive [N, tile, B * block - whole] for the keys after them, of all heads alike.
    """

    items: Tensor
    blocks: Tensor
    whole: int
    mask: Tensor

    def steps(self, rows: int, keys: int) -> Iterator[slice]:
        """As many tiles as the caches of all threads hold the logits of; at least one a thread."""
        size = torch.get_num_threads() * max(_CACHED_LOGITS // (rows * keys), 1)
        return (slice(i, i + size) for i in range(0, len(self.items), size))


class _Grid:
    """Queries as tiles, keys and values as blocks, all heads in one batch dimension."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> None:
        self.selection, self.plan = selection, selection.plan
        self.heads, self.groups = k.shape[1], q.shape[1] // k.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = self.tiles(q)
        self.k, self.v = self.blocks(k), self.blocks(v)
        self._buffers: dict[str, Tensor] = {}

    def tiles(self, x: Tensor) -> Tensor:
        """[T, Hq, D] as [Hkv * tiles, G * tile, D], in float32 or float64."""
        return query_tiles(x.to(self.dtype), self.plan, self.groups).flatten(0, 1)

    def rows(self, tiles: Tensor) -> Tensor:
        """The inverse of `tiles`."""
        return from_query_tiles(tiles.unflatten(0, (self.heads, -1)), self.plan, self.groups)

    def blocks(self, x: Tensor) -> Tensor:
        """[T, Hkv, D] as [Hkv * blocks, block * D], in float32 or float64."""
        return key_blocks(x.to(self.dtype), self.plan).flatten(0, 1).flatten(1)

    def keys(self, blocks: Tensor) -> Tensor:
        """The inverse of `blocks`."""
        shape = (self.heads, -1, self.plan.block, self.q.shape[-1])
        return from_key_blocks(blocks.view(shape), self.plan)

    def gather(self, name: str, blocks: Tensor, index: Tensor) -> Tensor:
        """[Hkv * blocks, block * D] at [N, B] as [N, B * block, D]."""
        gathered = self.buffer(name, index.numel(), blocks.shape[1])
        torch.index_select(blocks, 0, index.flatten(), out=gathered)
        return gathered.view(len(index), -1, self.q.shape[-1])

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory written anew in each step: fresh pages would cost as much as the products."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self.q.new_empty(size)
        return self._buffers[name][:size].view(shape)


def check(q: Tensor, sinks: Tensor | None, selection: Selection, options: Options) -> None:
    """ValueError for tensors of another device."""
    if q.device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes CPU tensors, got {q.device}")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    selection: Selection,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq]; see `sparse_attention` for the arguments."""
    grid, softcap = _Grid(q, k, v, selection), options.softcap
    factor = _factor(options)
    out, lse = torch.empty_like(grid.q), grid.q.new_empty(*grid.q.shape[:2], 1)
    for batch in _batches(grid, options.window):
        rows = grid.q[batch.items].mul_(factor)
        outs, lses = torch.empty_like(rows), rows.new_empty(*rows.shape[:2], 1)
        for step in batch.steps(rows.shape[1], batch.blocks.shape[1] * grid.plan.block):
            keys = grid.gather("keys", grid.k, batch.blocks[step])
            values = grid.gather("values", grid.v, batch.blocks[step])
            logits = grid.buffer("logits", len(keys), rows.shape[1], keys.shape[1])
            torch.bmm(rows[step], keys.transpose(1, 2), out=logits)
            if softcap is not None:
                logits.tanh_().mul_(softcap * _LOG2E)
            masked = logits.unflatten(1, (grid.groups, -1))[..., batch.whole :]
            masked.add_(batch.mask[step][:, None])
            largest = logits.amax(-1, keepdim=True)
            weights = logits.sub_(largest).exp2_()
            total = weights.sum(-1, keepdim=True)
            torch.bmm(weights, values, out=outs[step]).div_(total)
            lses[step] = largest.add_(total.log2_())
        out[batch.items], lse[batch.items] = outs, lses.div_(_LOG2E)
    packed, total = grid.rows(out), grid.rows(lse)[..., 0]
    if sinks is not None:
        of_keys, total = total, torch.logaddexp(total, sinks.to(total.dtype))
        packed = packed * (of_keys - total).exp_()[..., None]
    return packed.to(q.dtype), total


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks.

    A sink changes nothing but the denominator, and out and lse have that: from them the weights
    and the gradients of q, k and v follow as without one.

    Logits stand transposed, [keys, rows]: in this layout no product but the small dQ reads a
    transposed left operand, which PyTorch's matrix library takes a third longer for.
    """
    grid, softcap = _Grid(q, k, v, selection), options.softcap
    factor = _factor(options)
    grads = grid.tiles(grad_out)
    products = (out.to(grid.dtype) * grad_out).sum(-1)
    deltas = grid.tiles(products[..., None]).transpose(1, 2)
    shifts = (grid.tiles(lse[..., None]) * _LOG2E).transpose(1, 2)
    dq, dk, dv = torch.empty_like(grid.q), torch.zeros_like(grid.k), torch.zeros_like(grid.v)
    for batch in _batches(grid, options.window):
        rows, grad = grid.q[batch.items], grads[batch.items]
        scaled, mask = rows * factor, batch.mask.transpose(1, 2).contiguous()
        shift, delta = shifts[batch.items], deltas[batch.items]
        d_rows = rows.new_empty(len(rows), rows.shape[2], rows.shape[1])
        for step in batch.steps(rows.shape[1], batch.blocks.shape[1] * grid.plan.block):
            blocks = batch.blocks[step].flatten()
            keys = grid.gather("keys", grid.k, batch.blocks[step])
            values = grid.gather("values", grid.v, batch.blocks[step])
            shape = (*keys.shape[:2], rows.shape[1])
            logits, d_logits = grid.buffer("logits", *shape), grid.buffer("d_logits", *shape)
            d_keys = grid.buffer("d_keys", *keys.shape)

            torch.bmm(keys, scaled[step].transpose(1, 2), out=logits)
            if softcap is not None:
                slopes = grid.buffer("slopes", *shape)
                torch.mul(logits.tanh_(), logits, out=slopes).neg_().add_(1)
                logits.mul_(softcap * _LOG2E)
            masked = logits.unflatten(2, (grid.groups, -1))[:, batch.whole :]
            masked.add_(mask[step][:, :, None])
            weights = logits.sub_(shift[step]).exp2_()
            torch.bmm(weights, grad[step], out=d_keys)
            dv.index_add_(0, blocks, d_keys.view(len(blocks), -1))

            torch.bmm(values, grad[step].transpose(1, 2), out=d_logits)
            d_logits.sub_(delta[step]).mul_(weights)
            if softcap is not None:
                d_logits.mul_(slopes)
            torch.bmm(d_logits, rows[step], out=d_keys)
            dk.index_add_(0, blocks, d_keys.view(len(blocks), -1))
            torch.bmm(keys.transpose(1, 2), d_logits, out=d_rows[step])
        dq[batch.items] = d_rows.transpose(1, 2)
    d_sinks = None
    if sinks is not None:
        shares = (sinks.to(lse.dtype) - lse).exp_()
        d_sinks = -(shares * products).sum(0).to(sinks.dtype)
    return (
        grid.rows(dq.mul_(options.scale)).to(q.dtype),
        grid.keys(dk.mul_(options.scale)).to(k.dtype),
        grid.keys(dv).to(v.dtype),
        d_sinks,
    )


def _factor(options: Options) -> float:
    """Of the products: gives logits in units of log 2, or what the soft cap's tanh takes."""
    return options.scale * (_LOG2E if options.softcap is None else 1 / options.softcap)


def _batches(grid: _Grid, window: int | None) -> Iterator[_Batch]:
    """All (head, tile) pairs, those of like lists together, in a fixed order."""
    plan, selection = grid.plan, grid.selection
    total_blocks = int(plan.first_block[-1])
    first_block = torch.from_numpy(plan.first_block[plan.document])
    unmasked = plan.full if window is None else np.zeros_like(plan.full)
    shapes = np.stack([unmasked, np.diff(plan.offsets)], axis=1)
    for whole, size in np.unique(shapes, axis=0).tolist():
        tiles = torch.from_numpy(np.flatnonzero((shapes == (whole, size)).all(1)))
        columns_per_row = (size - whole) * plan.block + grid.q.shape[2]
        row_bytes = grid.q.shape[1] * columns_per_row * grid.q.element_size()
        items = (torch.arange(grid.heads)[:, None] * plan.tiles + tiles).flatten()
        for part in items.split(max(_BATCH_BYTES // row_bytes, 1)):
            head, tile = part // plan.tiles, part % plan.tiles
            slots = selection.offsets[tile][:, None] + torch.arange(size)
            columns = selection.columns[head[:, None], slots].long()
            start = head * total_blocks + first_block[tile]
            entry = selection.entry[head[:, None], slots[:, whole:]]
            yield _Batch(
                items=part,
                # An empty slot gathers some block; its entry row hides it.
                blocks=columns.clamp(min=0) + start[:, None],
                whole=whole * plan.block,
                mask=_mask(grid, tile, columns[:, whole:], entry, window),
            )


def _mask(grid: _Grid, tile: Tensor, columns: Tensor, entry: Tensor, window: int | None) -> Tensor:
    """Additive mask [N, tile, B * block] of blocks that not every row sees whole."""
    plan = grid.plan
    row = torch.arange(plan.tile)
    position = torch.from_numpy(plan.start)[tile][:, None] + row
    key = (columns[..., None] * plan.block + torch.arange(plan.block)).flatten(1)
    seen = key[:, None, :] <= position[:, :, None]
    seen &= (row[:, None] >= entry[:, None, :]).repeat_interleave(plan.block, -1)
    if window is not None:
        seen &= position[:, :, None] - key[:, None, :] < window
    return torch.zeros(seen.shape, dtype=grid.dtype).masked_fill_(~seen, float("-inf"))
