"""Selection, first half: softmax masses of complete key blocks, strip by strip of tiles."""

import triton
import triton.language as tl

from lit_sparse.attention.triton.primitives import load_keys, load_rows


@triton.jit(do_not_specialize=["blocks"])
def means_kernel(
    K,
    MEANS,
    BLOCKS,
    blocks,
    k_token,
    k_head,
    BLOCK_FIELDS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """MEANS [Hkv, blocks, D]: the mean key of each complete block. Grid (blocks, Hkv)."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    FIELD = BLOCKS + block.to(tl.int64) * BLOCK_FIELDS
    first_key = tl.load(FIELD)
    position = tl.load(FIELD + 1)
    length = tl.load(FIELD + 2)
    if position + BLOCK > length:
        return
    keys = load_keys(K, first_key, head, k_token, k_head, BLOCK, D, DP, BLOCK, False, False)
    mean = tl.sum(keys.to(tl.float32), 0) / BLOCK
    dim = tl.arange(0, DP)
    to = MEANS + (head.to(tl.int64) * blocks + block) * D + dim
    tl.store(to, mean.to(MEANS.dtype.element_ty), mask=dim < D)


@triton.jit
def asking_index(row, late, TILE: tl.constexpr):
    """Which of a tile's stored rows is `row`, and whether it fills a late slot.

    Slot j is filled at row (2j + 1) * TILE // (2 * late). Up to TILE slots each have a row of
    their own, stored in the order of slots; of more slots every row has some, stored by row.
    """
    first = (2 * late * row + TILE - 1) // (2 * TILE)
    after = tl.minimum((2 * late * (row + 1) + TILE - 1) // (2 * TILE), late)
    return tl.where(late > TILE, row, first), first < after


@triton.jit
def _load_means(MEANS, begin, end, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr):
    block = begin + tl.arange(0, STEP)
    dim = tl.arange(0, DP)
    mask = (block < end)[:, None] & (dim < D)[None, :]
    return tl.load(MEANS + block[:, None] * D + dim[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["strip_first", "strip", "width", "asked", "blocks"])
def masses_kernel(
    Q,
    MEANS,
    SUMS,
    ASKED,
    TILES,
    strip_first,
    strip,
    width,
    asked,
    blocks,
    scale_log2,
    q_token,
    q_head,
    TILE_FIELDS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Masses of the blocks complete before a tile, for its rows; summed over the group's heads.

    Grid (strip * chunks, Hkv): tiles strip_first .. strip_first + strip - 1. Writes
    SUMS float32 [Hkv, strip, chunks, width], the sum over a chunk's rows, and
    ASKED float32 [Hkv, strip, asked, width], the tile's first row and then those that fill late
    slots (`asking_index`). A mass that is no number counts as 0: what a broken activation scores
    is decided by index.
    """
    TOKENS: tl.constexpr = ROWS // GP
    CHUNKS: tl.constexpr = (TILE + TOKENS - 1) // TOKENS
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    chunk = program % CHUNKS
    local = program // CHUNKS
    FIELD = TILES + (strip_first + local).to(tl.int64) * TILE_FIELDS
    first_query = tl.load(FIELD) + chunk * TOKENS
    existing = tl.load(FIELD + 2).to(tl.int32) - chunk * TOKENS
    if tl.load(FIELD + 15) < 2:
        return
    first_block = tl.load(FIELD + 8)
    complete = tl.load(FIELD + 10).to(tl.int32)
    late = tl.load(FIELD + 13).to(tl.int32)

    row = tl.arange(0, ROWS)
    exists = (row // GP < existing) & (row % GP < G)
    q = load_rows(Q, first_query, tl.program_id(1), q_token, q_head, existing, G, GP, D, DP, ROWS)
    MEANS += (head * blocks + first_block) * D
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, complete, STEP):
        mean = _load_means(MEANS, begin, complete, D, DP, STEP)
        logits = tl.dot(q, tl.trans(mean)) * scale_log2
        visible = begin + tl.arange(0, STEP) < complete
        logits = tl.where(visible[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log2(total)

    token = chunk * TOKENS + tl.arange(0, TOKENS)
    index, asks = asking_index(token, late, TILE)
    tile_row = head * strip + local
    SUMS += (tile_row * CHUNKS + chunk) * width
    ASKED += tile_row * asked * width
    for begin in range(0, complete, STEP):
        mean = _load_means(MEANS, begin, complete, D, DP, STEP)
        logits = tl.dot(q, tl.trans(mean)) * scale_log2
        weights = tl.exp2(logits - lse[:, None])
        weights = tl.where(exists[:, None], weights, 0.0)
        mass = tl.sum(tl.reshape(weights, [TOKENS, GP, STEP]), 1)
        mass = tl.where(mass == mass, mass, 0.0)
        column = begin + tl.arange(0, STEP)
        tl.store(SUMS + column, tl.sum(mass, 0), mask=column < complete)
        to = ASKED + column[None, :]
        inside = (column < complete)[None, :]
        tl.store(to + tl.zeros([TOKENS, 1], tl.int32), mass, mask=inside & (token == 0)[:, None])
        tl.store(to + ((1 + index) * width)[:, None], mass, mask=inside & asks[:, None])
