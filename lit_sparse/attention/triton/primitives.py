"""What several kernels share: loads of packed rows and of keys, and the logits.

Rows are packed: row r of a program is token r // GP and query head r % GP of its key-value head,
where GP is the group size G rounded up to a power of two (the surplus rows are idle).
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    X,
    first,
    head,
    token_stride,
    head_stride,
    existing,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows [ROWS, DP] of X [T, Hq, D] from packed token `first` on; 0 past `existing` tokens."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DP)
    base = X + first.to(tl.int64) * token_stride + head.to(tl.int64) * G * head_stride
    offsets = (row // GP * token_stride + row % GP * head_stride)[:, None] + dim[None, :]
    mask = ((row // GP < existing) & (row % GP < G))[:, None]
    if D != DP:
        mask = mask & (dim < D)[None, :]
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(
    X,
    value,
    first,
    head,
    token_stride,
    head_stride,
    existing,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The inverse of `load_rows`."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DP)
    base = X + first.to(tl.int64) * token_stride + head.to(tl.int64) * G * head_stride
    offsets = (row // GP * token_stride + row % GP * head_stride)[:, None] + dim[None, :]
    mask = ((row // GP < existing) & (row % GP < G))[:, None] & (dim < D)[None, :]
    tl.store(base + offsets, value.to(X.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    X,
    first,
    head,
    token_stride,
    head_stride,
    existing,
    D: tl.constexpr,
    DP: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys or values [KEYS, DP] of one head from packed token `first` on.

    MASKED: zeros past `existing` keys, whatever the next document holds there (0 * NaN is NaN).
    TMA: X is a tensor descriptor and the strides are unused.
    """
    key = tl.arange(0, KEYS)
    dim = tl.arange(0, DP)
    if TMA:
        x = X.load([first.to(tl.int32), head, 0]).reshape(KEYS, DP)
        if MASKED:
            x = tl.where((key < existing)[:, None], x, tl.zeros_like(x))
    else:
        base = X + first.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
        offsets = key[:, None] * token_stride + dim[None, :]
        if MASKED:
            x = tl.load(
                base + offsets, mask=(key < existing)[:, None] & (dim < D)[None, :], other=0.0
            )
        elif D == DP:
            x = tl.load(base + offsets)
        else:
            mask = tl.broadcast_to((dim < D)[None, :], (KEYS, DP))
            x = tl.load(base + offsets, mask=mask, other=0.0)
    return x


@triton.jit
def cap_logits(products, cap_in, cap_out):
    """Soft-capped logits, in units of log 2, and tanh, from products of queries and keys.

    cap_in: 2 * log2(e) * scale / softcap; cap_out: softcap * log2(e).
    """
    # tanh|x| = (1 - e) / (1 + e) with e = exp(-2|x|): never overflows, and 1 - e is exact near 0.
    decay = tl.exp2(-tl.abs(products) * cap_in)
    size = (1.0 - decay) / (1.0 + decay)
    tanh = tl.where(products < 0.0, -size, size)
    return cap_out * tanh, tanh


@triton.jit
def next_column(COLUMNS, slot, last):
    """The list's next block, 0 in place of an empty slot: loaded one step ahead of its use.

    A column loaded at the head of a step would be a second level of indirection, which the
    pipeliner pays for with half of its depth.
    """
    return tl.maximum(tl.load(COLUMNS + tl.minimum(slot, last)), 0)


@triton.jit
def read_tile(TILES, program, TILE_FIELDS: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr):
    """The rows of a program that takes TOKENS tokens of a tile, and the tile's list.

    Returns packed index, document position and number (none: <= 0) of its tokens, and how many of
    the tile's tokens come before; packed index of the document's first key, and its keys; where the
    list starts, how many of its slots every row sees, and all of them.
    """
    CHUNKS: tl.constexpr = (TILE + TOKENS - 1) // TOKENS
    chunk = program % CHUNKS * TOKENS
    FIELD = TILES + (program // CHUNKS).to(tl.int64) * TILE_FIELDS
    first_query = tl.load(FIELD) + chunk
    start = tl.load(FIELD + 1).to(tl.int32) + chunk
    existing = tl.load(FIELD + 2).to(tl.int32) - chunk
    first_key = tl.load(FIELD + 3)
    length = tl.load(FIELD + 4).to(tl.int32)
    offset = tl.load(FIELD + 5)
    full = tl.load(FIELD + 6).to(tl.int32)
    size = tl.load(FIELD + 7).to(tl.int32)
    return first_query, start, existing, chunk, first_key, length, offset, full, size


@triton.jit
def seen_keys(
    key_start, position, token, entry, window, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """bool [ROWS, KEYS]: the keys from `key_start` on that rows at `position` see.

    MASKED: of a block that only tokens from `entry` on see.
    """
    key = key_start + tl.arange(0, KEYS)
    seen = key[None, :] <= position[:, None]
    if MASKED:
        seen &= (token >= entry)[:, None]
    if WINDOW:
        seen &= position[:, None] - key[None, :] < window
    return seen


@triton.jit
def advance(slot, sub, SUB: tl.constexpr):
    """The next of SUB steps within a list's slot, or the next slot's first.

    By selection: a branch would come too late for the loads that are issued ahead.
    """
    if SUB == 1:
        slot += 1
    else:
        wrap = (sub == SUB - 1).to(tl.int32)
        slot += wrap
        sub = (sub + 1) * (1 - wrap)
    return slot, sub
