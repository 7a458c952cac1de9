"""Backward, gradient of the queries: the forward's lists, walked again."""

import triton
import triton.language as tl

from lit_sparse.attention.triton.primitives import (
    advance,
    cap_logits,
    load_keys,
    load_rows,
    next_column,
    read_tile,
    seen_keys,
    store_rows,
)


@triton.jit(do_not_specialize=["slots", "tokens", "window"])
def dq_kernel(
    Q,
    K,
    V,
    DOUT,
    LSE,
    DELTA,
    DQ,
    COLUMNS,
    ENTRY,
    TILES,
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
    dq_token,
    dq_head,
    TILE_FIELDS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
):
    """dq of ROWS packed rows of one tile and key-value head. Grid and lists as in the forward.

    LSE, DELTA: float32 [Hkv, T, G], the former in units of log 2, +inf for rows without keys.
    """
    TOKENS: tl.constexpr = ROWS // GP
    SUB: tl.constexpr = BLOCK // STEP
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first_query, start, existing, chunk, first_key, length, offset, full, size = read_tile(
        TILES, program, TILE_FIELDS, TILE, TOKENS
    )
    if existing <= 0:
        return
    COLUMNS += head.to(tl.int64) * slots + offset
    ENTRY += head.to(tl.int64) * slots + offset

    row = tl.arange(0, ROWS)
    token = row // GP
    position = start + token
    q = load_rows(Q, first_query, head, q_token, q_head, existing, G, GP, D, DP, ROWS)
    dout = load_rows(DOUT, first_query, head, do_token, do_head, existing, G, GP, D, DP, ROWS)
    exists = (token < existing) & (row % GP < G)
    statistics = (head.to(tl.int64) * tokens + first_query) * G + token * G + row % GP
    lse = tl.load(LSE + statistics, mask=exists, other=float("inf"))
    delta = tl.load(DELTA + statistics, mask=exists, other=0.0)
    dq = tl.zeros([ROWS, DP], tl.float32)

    column = next_column(COLUMNS, 0, size - 1)
    for MASKED in tl.static_range(2):
        if MASKED:
            low, high = full, size
        else:
            low, high = 0, full
        slot = low
        sub = 0
        entry = tl.load(ENTRY + low) - chunk if MASKED else 0
        for _ in range(low * SUB, high * SUB):
            key_start = column * BLOCK + sub * STEP
            k = load_keys(
                K, first_key + key_start, head, k_token, k_head, length - key_start,
                D, DP, STEP, MASKED, TMA,
            )  # fmt: skip
            v = load_keys(
                V, first_key + key_start, head, v_token, v_head, length - key_start,
                D, DP, STEP, MASKED, TMA,
            )  # fmt: skip
            logits = tl.dot(q, tl.trans(k))
            if SOFTCAP:
                logits, tanh = cap_logits(logits, cap_in, cap_out)
            else:
                logits = logits * scale_log2
            if MASKED or WINDOW:
                seen = seen_keys(key_start, position, token, entry, window, STEP, MASKED, WINDOW)
                logits = tl.where(seen, logits, float("-inf"))
            weights = tl.exp2(logits - lse[:, None])
            d_weights = tl.dot(dout, tl.trans(v))
            d_logits = weights * (d_weights - delta[:, None])
            if SOFTCAP:
                d_logits = d_logits * (1.0 - tanh * tanh)
            dq = tl.dot(d_logits.to(k.dtype), k, dq)

            slot, sub = advance(slot, sub, SUB)
            column = next_column(COLUMNS, slot, size - 1)
            if MASKED:
                entry = tl.load(ENTRY + tl.minimum(slot, size - 1)) - chunk

    dq = dq * scale
    store_rows(DQ, dq, first_query, head, dq_token, dq_head, existing, G, GP, D, DP, ROWS)
