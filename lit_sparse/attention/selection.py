"""Selection: which key blocks each query tile keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention.plan import Plan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Transposed:
    """A selection read by key block: which tiles attend to it.

    Args:
        offsets: int64 [Hkv, blocks + 1], where the list of each block starts in `tiles`.
        tiles: int32 [Hkv, slots], tiles in ascending order; past a head's last list, -1.
        entry: int32 [Hkv, slots], first row of the tile that sees the block.
    """

    offsets: Tensor
    tiles: Tensor
    entry: Tensor


@dataclass(frozen=True)
class Selection:
    """The kept blocks of every (kv head, tile), as ragged lists of equal length for all heads.

    Block numbers count from the start of the block's own document. Each list stands in the order
    `[sink | base | local | late | diagonal]` described at `Plan`.

    Args:
        plan: tiles, list lengths and everything else that document lengths determine.
        columns: int32 [Hkv, slots], kept blocks; -1 is a late slot left empty.
        entry: int32 [Hkv, slots], first row of the tile that sees the block: 0 for all but late
            ones, `tile` in empty slots.
    """

    plan: Plan
    columns: Tensor
    entry: Tensor

    @property
    def tile(self) -> int:
        return self.plan.tile

    @property
    def block(self) -> int:
        return self.plan.block

    @cached_property
    def offsets(self) -> Tensor:
        """int64 [tiles + 1] on the host: the list of tile t is `columns[:, offsets[t]:offsets[t +
        1]]`.
        """
        return torch.from_numpy(self.plan.offsets)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [documents + 1]: packed boundaries of the queries."""
        return torch.tensor(self.plan.queries, dtype=torch.int32, device=self.columns.device)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """int32 [documents + 1]: packed boundaries of the keys."""
        return torch.tensor(self.plan.keys, dtype=torch.int32, device=self.columns.device)

    @property
    def keeps_everything(self) -> bool:
        """Whether the lengths alone say that nothing is dropped: plain causal attention."""
        return self.plan.keeps_everything

    @cached_property
    def slot_tile(self) -> Tensor:
        """int64 [slots]: the tile of each slot."""
        device, slots = self.columns.device, self.columns.shape[1]
        lengths = self.plan.on_device("lengths", device)
        tiles = torch.arange(self.plan.tiles, device=device)
        return tiles.repeat_interleave(lengths, output_size=slots)

    @cached_property
    def slot_block(self) -> Tensor:
        """int64 [Hkv, slots]: the kept block counted over all documents, -1 in empty slots."""
        first = self.plan.on_device("tile_first_block", self.columns.device)
        columns = self.columns.long()
        return torch.where(columns < 0, columns, columns + first[self.slot_tile])

    @cached_property
    def density(self) -> float:
        """Kept causal pairs / causal pairs, over all heads; 1.0 if there are no pairs."""
        plan, device = self.plan, self.columns.device
        rows = torch.from_numpy(plan.rows).to(device)[self.slot_tile]
        start = torch.from_numpy(plan.start).to(device)[self.slot_tile]
        first, end = self.entry.long(), rows
        # Row r of the tile sees clip(start + r + 1 - key, 0, block) keys of the block that starts
        # at `key`.
        key = self.columns.long() * plan.block
        kept = _ramp(start + end - key, plan.block) - _ramp(start + first - key, plan.block)
        pairs = int(torch.where(self.columns >= 0, kept.clamp(min=0), 0).sum())
        lengths = np.diff(plan.queries)
        causal = int((lengths * (lengths + 1) // 2 + lengths * plan.context).sum())
        return pairs / (causal * len(self.columns)) if causal else 1.0

    def entry_table(self, tiles: Tensor | None = None) -> Tensor:
        """int16 [Hkv, tiles, blocks of the longest document]: first row that sees a block, or
        `tile`.

        Args:
            tiles: int64 on the host, those that are asked for; None: all, quadratic in n.
        """
        if tiles is None:
            tiles = torch.arange(self.plan.tiles)
        device, heads = self.columns.device, len(self.columns)
        blocks = int(np.diff(self.plan.first_block).max(initial=0))
        lengths = torch.from_numpy(self.plan.lengths)[tiles]
        which = torch.arange(len(tiles)).repeat_interleave(lengths)
        within = torch.arange(len(which)) - (lengths.cumsum(0) - lengths)[which]
        slots = (self.offsets[tiles][which] + within).to(device)
        # One column more takes the writes of the empty slots.
        table = torch.full(
            (heads, len(tiles), blocks + 1), self.tile, dtype=torch.int16, device=device
        )
        columns = self.columns[:, slots]
        columns = torch.where(columns < 0, blocks, columns).long()
        index = which.to(device) * (blocks + 1) + columns
        table.view(heads, -1).scatter_(1, index, self.entry[:, slots].to(torch.int16))
        return table[..., :blocks]

    def row_places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tile of each packed row, and the row's number inside it: int64 [R] on the host."""
        starts = torch.from_numpy(self.plan.row_start)
        rows = rows.cpu()
        tile = torch.bucketize(rows, starts, right=True) - 1
        return tile, rows - starts[tile]

    def rows_blocks(self, rows: Tensor) -> Tensor:
        """bool [Hkv, R, blocks of the longest document]: the blocks of their own document that the
        packed `rows` see, whole or up to themselves. Its cost is rows x blocks.
        """
        tile, row = self.row_places(rows)
        tiles, own = tile.unique(return_inverse=True)
        device = self.columns.device
        return row.to(device)[:, None] >= self.entry_table(tiles)[:, own.to(device)]

    def rows_mask(self, rows: Tensor, keys: int, window: int | None = None) -> Tensor:
        """bool [Hkv, R, keys]: which keys of their own document (numbered from 0) the packed
        `rows` keep.

        The causal mask is included, and a sliding window of the nearest `window` keys if given;
        positions past the end of a row's document are False.
        """
        device = self.columns.device
        if not self.plan.tiles:
            return self.columns.new_zeros(len(self.columns), len(rows), keys, dtype=torch.bool)
        tile, row = self.row_places(rows)
        position = (torch.from_numpy(self.plan.start)[tile] + row).to(device)
        kept = self.rows_blocks(rows)
        key = torch.arange(keys, device=device)
        block = (key // self.block).clamp(max=max(kept.shape[-1] - 1, 0))
        seen = kept[:, :, block] & (key <= position[:, None])
        return seen if window is None else seen & (position[:, None] - key < window)

    @cached_property
    def _table(self) -> Tensor:
        return self.entry_table()

    def to_mask(self, window: int | None = None) -> Tensor:
        """bool [Hkv, Tq, Tk]: causal mask, documents, late entries and window. For small inputs."""
        plan, device = self.plan, self.columns.device
        mask = self.columns.new_zeros(
            len(self.columns), plan.queries[-1], plan.keys[-1], dtype=torch.bool
        )
        for document in range(len(plan.queries) - 1):
            q0, q1 = plan.queries[document : document + 2]
            k0, k1 = plan.keys[document : document + 2]
            if q1 > q0:
                rows = torch.arange(q0, q1, device=device)
                mask[:, q0:q1, k0:k1] = self.rows_mask(rows, k1 - k0, window)
        return mask

    def to_block_mask(self, groups: int = 1) -> BlockMask:
        """The same selection for FlexAttention, whose mask blocks are `tile` x `block`.

        Args:
            groups: query heads per key-value head; the mask has Hkv * groups heads.

        Raises:
            ValueError: documents do not start at multiples of tile and block (FlexAttention's grid
                is that of the whole row), or queries and keys differ.
        """
        from torch.nn.attention.flex_attention import BlockMask

        plan, heads = self.plan, len(self.columns)
        if plan.queries != plan.keys:
            raise ValueError("to_block_mask needs the keys of a document to be its queries")
        step = max(self.tile, self.block)
        if any(b % step for b in plan.queries):
            raise ValueError(
                f"to_block_mask needs documents that start at multiples of {step} tokens, got "
                f"{plan.queries}"
            )
        blocks = plan.keys[-1] // self.block
        # 0 dropped, 1 needs the mask, 2 kept whole.
        kind = torch.zeros(
            heads, plan.tiles, blocks + 1, dtype=torch.int8, device=self.columns.device
        )
        masked = torch.from_numpy(plan.offsets[:-1] + plan.full).to(kind.device)[self.slot_tile]
        whole = torch.arange(self.columns.shape[1], device=kind.device) < masked
        target = torch.where(self.slot_block < 0, blocks, self.slot_block) + self.slot_tile * (
            blocks + 1
        )
        kind.view(heads, -1).scatter_(1, target, (1 + whole.to(torch.int8)).expand(heads, -1))
        kind = kind[..., :blocks].repeat_interleave(groups, 0)
        first_block = torch.from_numpy(plan.first_block[plan.document]).to(kind.device)
        start = torch.from_numpy(plan.start).to(kind.device)
        table, tile, block = self._table, self.tile, self.block

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            t = q_idx // tile
            column = kv_idx // block - first_block[t]
            key = column * block + kv_idx % block
            inside = column.clamp(0, table.shape[-1] - 1)
            seen = q_idx % tile >= table[h // groups, t, inside]
            return seen & (column >= 0) & (key <= start[t] + q_idx % tile)

        def ordered(flag: Tensor) -> tuple[Tensor, Tensor]:
            indices = (
                flag.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
            )
            return flag.sum(-1, dtype=torch.int32)[None], indices[None]

        return BlockMask.from_kv_blocks(
            *ordered(kind == 1),
            *ordered(kind == 2),
            BLOCK_SIZE=(tile, block),
            mask_mod=mask_mod,
            seq_lengths=(plan.queries[-1], plan.keys[-1]),
        )

    def transpose(self) -> Transposed:
        """The lists by key block, stable: the tiles of a block in ascending order."""
        heads, slots = self.columns.shape
        blocks = int(self.plan.first_block[-1])
        device = self.columns.device
        # As narrow as it can be: the sort reads and writes its keys once for each of their bytes.
        kind = torch.int32 if heads * (blocks + 1) < 2**31 else torch.int64
        first = self.plan.on_device("tile_first_block", device).to(kind)[self.slot_tile]
        target = (self.columns + first).masked_fill(self.columns < 0, blocks)
        # One stable sort for all heads: each has the same number of slots, so a head's lists stay
        # in its own row. Prefix positions by binary search: no atomics.
        head = torch.arange(heads, device=device, dtype=kind)[:, None] * (blocks + 1)
        ordered, order = (head + target).flatten().sort(stable=True)
        block = torch.arange(blocks + 1, device=device, dtype=kind)
        offsets = torch.searchsorted(ordered, head + block)
        tiles = self.slot_tile[order % max(slots, 1)].view(heads, slots).to(torch.int32)
        return Transposed(
            offsets=offsets - head // (blocks + 1) * slots,
            tiles=tiles.masked_fill((ordered.view(heads, slots) - head) == blocks, -1),
            entry=self.entry.flatten()[order].view(heads, slots),
        )


def _ramp(x: Tensor, size: int) -> Tensor:
    """sum over y = 1 .. x of clip(y, 0, size)."""
    x = x.clamp(min=0)
    low = x.clamp(max=size)
    return low * (low + 1) // 2 + (x - low) * size
