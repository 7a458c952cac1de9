"""Packed rows as padded tiles and blocks, and back: where tiles and blocks are addressable."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from lit_sparse.attention.plan import Ints, Plan


def _cut(x: Tensor, boundaries: tuple[int, ...], first: Ints, size: int) -> Tensor:
    """Cut every document of a packed tensor into pieces of `size` rows, the last padded with zeros.

    Args:
        x: [T, ...].
        boundaries: packed boundaries of the documents (cu_seqlens on the host).
        first: first piece of each document, and the number of all.

    Returns:
        [pieces, size, ...]; no copy where all documents are whole pieces.
    """
    if all(b % size == 0 for b in boundaries):
        return x.reshape(-1, size, *x.shape[1:])
    pieces = x.new_zeros(int(first[-1]) * size, *x.shape[1:])
    for document, (begin, end) in enumerate(pairwise(boundaries)):
        at = int(first[document]) * size
        pieces[at : at + end - begin] = x[begin:end]
    return pieces.unflatten(0, (-1, size))


def _join(pieces: Tensor, boundaries: tuple[int, ...], first: Ints) -> Tensor:
    """The inverse of `_cut`: padding is dropped."""
    size = pieces.shape[1]
    rows = pieces.reshape(-1, *pieces.shape[2:])
    if all(b % size == 0 for b in boundaries):
        return rows
    x = rows.new_empty(boundaries[-1], *rows.shape[1:])
    for document, (begin, end) in enumerate(pairwise(boundaries)):
        at = int(first[document]) * size
        x[begin:end] = rows[at : at + end - begin]
    return x


def query_tiles(q: Tensor, plan: Plan, groups: int) -> Tensor:
    """q [T, Hkv * G, D] as [Hkv, tiles, G * tile, D]: a tile's rows, one head after the other."""
    heads, dim = q.shape[1] // groups, q.shape[2]
    tiles = _cut(q, plan.queries, plan.first_tile, plan.tile).unflatten(2, (heads, groups))
    return tiles.permute(2, 0, 3, 1, 4).reshape(heads, plan.tiles, groups * plan.tile, dim)


def from_query_tiles(tiles: Tensor, plan: Plan, groups: int) -> Tensor:
    """The inverse of `query_tiles`."""
    tiles = tiles.unflatten(2, (groups, plan.tile)).permute(1, 3, 0, 2, 4)
    return _join(tiles.flatten(2, 3), plan.queries, plan.first_tile)


def key_blocks(x: Tensor, plan: Plan) -> Tensor:
    """Keys or values [T, Hkv, D] as [Hkv, blocks, block, D]."""
    return _cut(x, plan.keys, plan.first_block, plan.block).permute(2, 0, 1, 3).contiguous()


def from_key_blocks(blocks: Tensor, plan: Plan) -> Tensor:
    """The inverse of `key_blocks`."""
    return _join(blocks.permute(1, 2, 0, 3), plan.keys, plan.first_block)
