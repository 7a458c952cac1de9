"""The selection on the GPU: masses in strips, exact thresholds, the lists of the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from lit_sparse.attention.plan import Plan
from lit_sparse.attention.selection import Selection
from lit_sparse.attention.triton.backend import rowwise
from lit_sparse.attention.triton.choose import choose_kernel, fill_kernel
from lit_sparse.attention.triton.config import Rows, launch, padded_dim
from lit_sparse.attention.triton.run import run
from lit_sparse.attention.triton.scoring import masses_kernel, means_kernel
from lit_sparse.attention.triton.tables import BLOCK_FIELDS, TILE_FIELDS, tables

STRIP_BYTES = 256 * 2**20
"""Masses that exist at a time, of all heads: tiles are scored in strips. Of long contexts an eighth
of the queries' own bytes, so that a strip still fills the GPU."""

_SPANS = (256, 1024, 4096, 16384)
"""Blocks that the chooser holds in registers; past the last they are read again in each pass."""


@dataclass(frozen=True)
class Strip:
    """Tiles first .. stop - 1 are chosen from the masses of tiles before .. stop - 1."""

    before: int
    first: int
    stop: int
    width: int
    """Blocks complete before any of its tiles, at most."""


def select(q: Tensor, k: Tensor, plan: Plan, scale: float) -> Selection:
    """The working-set selection by the "mass" scorer; see `lit_sparse.attention.select`.

    q [T, Hq, D], k [Tk, Hkv, D] on one device. Block means are rounded to their dtype.
    """
    heads, slots = k.shape[1], int(plan.offsets[-1])
    # Where lengths decide alone all heads have one list, a quadratic one if nothing is dropped: a
    # single copy.
    lists = heads if plan.chooses else 1
    columns = torch.empty(lists, slots, dtype=torch.int32, device=q.device)
    entry = torch.empty_like(columns)
    run(
        fill_kernel, (plan.tiles, lists),
        columns, entry, tables(plan, q.device).tiles, slots, TILE_FIELDS, 128,
    )  # fmt: skip
    if plan.chooses:
        _choose(q, k, plan, scale, columns, entry)
    return Selection(plan, columns.expand(heads, slots), entry.expand(heads, slots))


def _choose(q: Tensor, k: Tensor, plan: Plan, scale: float, columns: Tensor, entry: Tensor) -> None:
    heads, dim = k.shape[1], k.shape[2]
    rows = Rows.of(q.shape[1] // heads, plan.tile)
    on_device = tables(plan, q.device)
    blocks = len(on_device.blocks)
    q, k = rowwise(q), rowwise(k)
    means = torch.empty(heads, blocks, dim, dtype=k.dtype, device=k.device)
    run(
        means_kernel, (blocks, heads),
        k, means, on_device.blocks, blocks, k.stride(0), k.stride(1),
        BLOCK_FIELDS, dim, padded_dim(dim), plan.block,
    )  # fmt: skip

    config = launch("masses", q.device, dim)
    size = rows.count(config.rows)
    chunks = rows.chunks(size)
    asked = 1 + min(int(plan.late.max(initial=0)), plan.tile)
    late = triton.next_power_of_2(max(int(plan.late.max(initial=0)), 64))
    row_bytes = 4 * heads * (asked + chunks)
    cut = strips(plan, row_bytes, max(STRIP_BYTES, q.nbytes // 8))
    most = max((strip.stop - strip.before) * strip.width for strip in cut)
    sums = torch.empty(heads * chunks * most, dtype=torch.float32, device=q.device)
    masses = torch.empty(heads * asked * most, dtype=torch.float32, device=q.device)
    for strip in cut:
        tiles = strip.stop - strip.before
        run(
            masses_kernel, (tiles * chunks, heads),
            q, means, sums, masses, on_device.tiles, strip.before, tiles, strip.width, asked,
            blocks, scale * math.log2(math.e), q.stride(0), q.stride(1),
            TILE_FIELDS, rows.groups, rows.padded_groups, dim, padded_dim(dim), plan.tile,
            size, config.step, num_warps=config.warps_for(size), num_stages=config.stages,
        )  # fmt: skip
        span = next((span for span in _SPANS if span >= strip.width), _SPANS[-1])
        run(
            choose_kernel, (tiles, heads),
            sums, masses, columns, entry, on_device.tiles, strip.before, tiles, strip.width, asked,
            strip.first - strip.before, columns.shape[1], TILE_FIELDS, plan.tile, chunks, span,
            -(-strip.width // span), late,
            num_warps={256: 4, 1024: 4, 4096: 8, 16384: 16}[span],
        )  # fmt: skip


def strips(plan: Plan, row_bytes: int, limit: int) -> list[Strip]:
    """The sparse tiles in runs whose masses fit `limit` bytes, each with the tile before it.

    Args:
        row_bytes: bytes of one block's masses for one tile.
    """
    sparse = np.flatnonzero(plan.sparse)
    if not len(sparse):
        return []
    found, first, end = [], int(sparse[0]), int(sparse[-1]) + 1
    while first < end:
        before = max(first - 1, 0)
        width = np.maximum.accumulate(plan.complete[before:end])
        cost = (np.arange(len(width)) + 1) * width * row_bytes
        # At least one tile beyond the one before, whatever it costs.
        stop = max(before + int(np.searchsorted(cost, limit, side="right")), first + 1)
        stop = min(stop, end)
        found.append(Strip(before, first, stop, max(int(width[stop - before - 1]), 1)))
        first = stop
    return found
