"""Packed rows as padded tiles and blocks, and back: the shape in which tiles and blocks are
addressable.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from lit_sparse.attention.plan import Ints, Plan


def to_pieces(x: Tensor, boundaries: tuple[int, ...], first: Ints, size: int) -> Tensor:
    """Cut every document of a packed tensor into pieces of `size` rows, the last padded with zeros.

    Args:
        x: [T, H, D].
        boundaries: packed boundaries of the documents (cu_seqlens on the host).
        first: first piece of each document, and the number of all (`Plan.first_tile`,
            `.first_block`).

    Returns:
        [H, pieces, size, D], contiguous.
    """
    total, heads, dim = x.shape
    if all(b % size == 0 for b in boundaries):
        return x.reshape(total // size, size, heads, dim).permute(2, 0, 1, 3).contiguous()
    pieces = x.new_zeros(heads, int(first[-1]), size, dim)
    rows = pieces.view(heads, -1, dim)
    for document, (begin, end) in enumerate(pairwise(boundaries)):
        at = int(first[document]) * size
        rows[:, at : at + end - begin] = x[begin:end].transpose(0, 1)
    return pieces


def from_pieces(pieces: Tensor, boundaries: tuple[int, ...], first: Ints) -> Tensor:
    """The inverse of `to_pieces`: [H, pieces, size, D] to [T, H, D]; padding is dropped."""
    heads, _, size, dim = pieces.shape
    total = boundaries[-1]
    if all(b % size == 0 for b in boundaries):
        return pieces.permute(1, 2, 0, 3).reshape(total, heads, dim)
    x = pieces.new_empty(total, heads, dim)
    rows = pieces.reshape(heads, -1, dim)
    for document, (begin, end) in enumerate(pairwise(boundaries)):
        at = int(first[document]) * size
        x[begin:end] = rows[:, at : at + end - begin].transpose(0, 1)
    return x


def query_tiles(q: Tensor, plan: Plan, groups: int) -> Tensor:
    """q [T, Hkv * G, D] as [Hkv, tiles, G * tile, D]: the rows of a tile, one head after the
    other.
    """
    heads, dim = q.shape[1] // groups, q.shape[2]
    tiles = to_pieces(q, plan.queries, plan.first_tile, plan.tile)
    tiles = tiles.view(heads, groups, plan.tiles, plan.tile, dim).transpose(1, 2)
    return tiles.reshape(heads, plan.tiles, groups * plan.tile, dim)


def from_query_tiles(tiles: Tensor, plan: Plan, groups: int) -> Tensor:
    """The inverse of `query_tiles`."""
    heads, dim = tiles.shape[0], tiles.shape[-1]
    tiles = tiles.view(heads, plan.tiles, groups, plan.tile, dim).transpose(1, 2)
    tiles = tiles.reshape(heads * groups, plan.tiles, plan.tile, dim)
    return from_pieces(tiles, plan.queries, plan.first_tile)


def key_blocks(x: Tensor, plan: Plan) -> Tensor:
    """Keys or values [T, Hkv, D] as [Hkv, blocks, block, D]."""
    return to_pieces(x, plan.keys, plan.first_block, plan.block)


def from_key_blocks(blocks: Tensor, plan: Plan) -> Tensor:
    """The inverse of `key_blocks`."""
    return from_pieces(blocks, plan.keys, plan.first_block)
