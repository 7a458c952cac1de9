"""Backward, gradients of keys and values: a program takes a key block against its list of tiles.

Lists of blocks that very many tiles keep (the sink is in all of them) are cut into work items of
equal length, whose float32 partial sums a second kernel adds in a fixed order. Nothing is atomic,
so gradients repeat bit for bit.
"""

import triton
import triton.language as tl

from lit_sparse.attention.triton.primitives import advance, cap_logits, load_keys, load_rows


@triton.jit(do_not_specialize=["tokens"])
def statistics_kernel(
    OUT,
    DOUT,
    LSE_IN,
    LSE,
    DELTA,
    tokens,
    out_token,
    out_head,
    do_token,
    do_head,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = sum(out * dout), and lse in units of log 2, both as float32 [Hkv, T, G].

    Grid (rows / ROWS): rows are (token, query head). LSE_IN [T, Hq]; -inf becomes +inf, so that a
    row without keys has weights of 0 and not of exp(inf).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    exists = token < tokens
    dim = tl.arange(0, DP)
    mask = exists[:, None] & (dim < D)[None, :]
    out_at = (token * out_token + head * out_head)[:, None] + dim[None, :]
    do_at = (token * do_token + head * do_head)[:, None] + dim[None, :]
    out = tl.load(OUT + out_at, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(DOUT + do_at, mask=mask, other=0.0).to(tl.float32)
    lse = tl.load(LSE_IN + row, mask=exists, other=0.0) * 1.4426950408889634
    at = (head // G * tokens + token) * G + head % G
    tl.store(DELTA + at, tl.sum(out * dout, 1), mask=exists)
    tl.store(LSE + at, tl.where(lse == float("-inf"), float("inf"), lse), mask=exists)


@triton.jit
def _load_statistic(
    X, first, begin, end, other, G: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr
):
    """Rows [ROWS] of X [T, G] from token `first` on; `other` but for tokens begin .. end - 1."""
    row = tl.arange(0, ROWS)
    if G == GP:
        # One run of memory.
        x = tl.load(X + first * G + row, mask=(row >= begin * G) & (row < end * G), other=other)
    else:
        inside = (row // GP >= begin) & (row // GP < end) & (row % GP < G)
        x = tl.load(X + first * G + row // GP * G + row % GP, mask=inside, other=other)
    return x


@triton.jit
def _load_packed(
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
    TMA: tl.constexpr,
):
    """Rows [ROWS, DP] of X [T, Hq, D] from packed token `first` on.

    TMA: X is a descriptor with boxes [ROWS / GP, GP, DP]; rows past `existing` are the next
    document's and idle ones the next group's, and their weights are 0.
    """
    if TMA:
        x = X.load([first.to(tl.int32), head * G, 0]).reshape(ROWS, DP)
    else:
        x = load_rows(X, first, head, token_stride, head_stride, existing, G, GP, D, DP, ROWS)
    return x


@triton.jit(do_not_specialize=["slots", "tokens", "window"])
def dkdv_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DK,
    DV,
    PARTIAL,
    LISTS,
    ENTRIES,
    ITEMS,
    BLOCKS,
    slots,
    tokens,
    scale,
    scale_log2,
    cap_in,
    cap_out,
    window,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    do_token,
    do_head,
    dk_token,
    dk_head,
    dv_token,
    dv_head,
    BLOCK_FIELDS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    TMA: tl.constexpr,
):
    """dk and dv of KEYS keys of one block from one work item's tiles.

    Grid (items, BLOCK / KEYS). The first tiles of a list reach into the block (they are masked by
    position); the rest see it whole, late ones from their entry row on, which costs nothing: the
    lse of the rows before it is +inf. PARTIAL: float32 [2, partials, BLOCK, DP].
    """
    TOKENS: tl.constexpr = ROWS // GP
    SUB: tl.constexpr = (TILE + TOKENS - 1) // TOKENS
    DIAGONAL: tl.constexpr = BLOCK // TILE + 2
    ITEM = ITEMS + tl.program_id(0).to(tl.int64) * ITEM_FIELDS
    block = tl.load(ITEM + 1)
    if block < 0:
        return
    head = tl.load(ITEM).to(tl.int32)
    low = tl.load(ITEM + 2)
    count = (tl.load(ITEM + 3) - low).to(tl.int32)
    FIELD = BLOCKS + block * BLOCK_FIELDS
    inner = tl.program_id(1) * KEYS
    first_key = tl.load(FIELD) + inner
    key_start = tl.load(FIELD + 1).to(tl.int32) + inner
    length = tl.load(FIELD + 2).to(tl.int32)
    first_query = tl.load(FIELD + 3)
    queries = tl.load(FIELD + 4).to(tl.int32)
    context = length - queries
    # An empty list may begin where the last one ends; one entry is read of each.
    at = head.to(tl.int64) * slots + tl.minimum(low, slots - 1)
    LISTS += at
    ENTRIES += at
    LSE += (head.to(tl.int64) * tokens + first_query) * G
    DELTA += (head.to(tl.int64) * tokens + first_query) * G

    key = key_start + tl.arange(0, KEYS)
    existing_keys = length - key_start
    k = load_keys(K, first_key, head, k_token, k_head, existing_keys, D, DP, KEYS, True, False)
    if WANT_DK:
        v = load_keys(V, first_key, head, v_token, v_head, existing_keys, D, DP, KEYS, True, False)
        dk = tl.zeros([KEYS, DP], tl.float32)
    if WANT_DV:
        dv = tl.zeros([KEYS, DP], tl.float32)

    # Tiles that start before the block's last key, a prefix of the ascending list.
    ahead = tl.arange(0, triton.next_power_of_2(DIAGONAL))
    start = tl.load(LISTS + ahead, mask=ahead < count, other=0)
    reaching = (ahead < count) & (context + start < key_start + KEYS)
    diagonal = tl.sum(reaching.to(tl.int32), 0)

    last = tl.maximum(count - 1, 0)
    for MASKED in tl.static_range(1, -1, -1):
        if MASKED:
            begin, end = 0, diagonal
        else:
            begin, end = diagonal, count
        slot = begin
        sub = 0
        token_start = tl.load(LISTS + tl.minimum(slot, last))
        entry = tl.load(ENTRIES + tl.minimum(slot, last))
        for _ in range(begin * SUB, end * SUB):
            existing = queries - token_start
            if TOKENS > TILE:
                existing = tl.minimum(existing, TILE)
            q = _load_packed(
                Q, first_query + token_start, head, q_token, q_head, existing,
                G, GP, D, DP, ROWS, TMA,
            )  # fmt: skip
            dout = _load_packed(
                DOUT, first_query + token_start, head, do_token, do_head, existing,
                G, GP, D, DP, ROWS, TMA,
            )  # fmt: skip
            lse = _load_statistic(
                LSE, token_start, entry - token_start, existing, float("inf"), G, GP, ROWS
            )
            logits = tl.dot(k, tl.trans(q))
            if SOFTCAP:
                logits, tanh = cap_logits(logits, cap_in, cap_out)
            else:
                logits = logits * scale_log2
            if MASKED or WINDOW:
                position = context + token_start + tl.arange(0, ROWS) // GP
                seen = key[:, None] <= position[None, :]
                if WINDOW:
                    seen &= position[None, :] - key[:, None] < window
                logits = tl.where(seen, logits, float("-inf"))
            weights = tl.exp2(logits - lse[None, :])
            if WANT_DV:
                dv = tl.dot(weights.to(dout.dtype), dout, dv)
            if WANT_DK:
                delta = _load_statistic(DELTA, token_start, 0, existing, 0.0, G, GP, ROWS)
                d_weights = tl.dot(v, tl.trans(dout))
                d_logits = weights * (d_weights - delta[None, :])
                if SOFTCAP:
                    d_logits = d_logits * (1.0 - tanh * tanh)
                dk = tl.dot(d_logits.to(q.dtype), q, dk)

            slot, sub = advance(slot, sub, SUB)
            token_start = tl.load(LISTS + tl.minimum(slot, last)) + sub * TOKENS
            entry = tl.load(ENTRIES + tl.minimum(slot, last))

    # Loaded again where it is needed, not kept in registers through the loops.
    partial = tl.load(ITEM + 4)
    first_key = tl.load(FIELD) + inner
    dim = tl.arange(0, DP)
    mask = (key < length)[:, None] & (dim < D)[None, :]
    inside = (key - key_start)[:, None]
    if WANT_DK:
        dk = dk * scale
    if partial < 0:
        if WANT_DK:
            to_dk = DK + first_key * dk_token + head.to(tl.int64) * dk_head
            tl.store(
                to_dk + inside * dk_token + dim[None, :], dk.to(DK.dtype.element_ty), mask=mask
            )
        if WANT_DV:
            to_dv = DV + first_key * dv_token + head.to(tl.int64) * dv_head
            tl.store(
                to_dv + inside * dv_token + dim[None, :], dv.to(DV.dtype.element_ty), mask=mask
            )
    else:
        part = PARTIAL + partial * 2 * BLOCK * DP + (inner + inside) * DP + dim[None, :]
        if WANT_DK:
            tl.store(part, dk)
        if WANT_DV:
            tl.store(part + BLOCK * DP, dv)


@triton.jit(do_not_specialize=["blocks"])
def reduce_kernel(
    PARTIAL,
    COLUMNS,
    DK,
    DV,
    BLOCKS,
    blocks,
    dk_token,
    dk_head,
    dv_token,
    dv_head,
    BLOCK_FIELDS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dk and dv of blocks that were cut into several work items: their partial sums, in order.

    Grid (blocks, Hkv, BLOCK / KEYS). COLUMNS: int64 [Hkv, blocks, 2], first partial and how many.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    inner = tl.program_id(2) * KEYS
    COLUMN = COLUMNS + (head.to(tl.int64) * blocks + block) * 2
    first = tl.load(COLUMN)
    parts = tl.load(COLUMN + 1).to(tl.int32)
    if parts == 0:
        return
    FIELD = BLOCKS + block.to(tl.int64) * BLOCK_FIELDS
    first_key = tl.load(FIELD) + inner
    existing = tl.load(FIELD + 2).to(tl.int32) - tl.load(FIELD + 1).to(tl.int32) - inner
    inside = tl.arange(0, KEYS)[:, None]
    dim = tl.arange(0, DP)
    at = PARTIAL + first * 2 * BLOCK * DP + (inner + inside) * DP + dim[None, :]
    dk = tl.zeros([KEYS, DP], tl.float32)
    dv = tl.zeros([KEYS, DP], tl.float32)
    for _ in range(0, parts):
        dk += tl.load(at)
        dv += tl.load(at + BLOCK * DP)
        at += 2 * BLOCK * DP
    mask = (inside < existing) & (dim < D)[None, :]
    to = DK + first_key * dk_token + head.to(tl.int64) * dk_head
    tl.store(to + inside * dk_token + dim[None, :], dk.to(DK.dtype.element_ty), mask=mask)
    to = DV + first_key * dv_token + head.to(tl.int64) * dv_head
    tl.store(to + inside * dv_token + dim[None, :], dv.to(DV.dtype.element_ty), mask=mask)
