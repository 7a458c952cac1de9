"""Forward: a program takes the packed rows of a tile against the tile's list of key blocks."""

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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["slots", "window"])
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    SINKS,
    COLUMNS,
    ENTRY,
    TILES,
    slots,
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
    out_token,
    out_head,
    lse_token,
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
    SINK: tl.constexpr,
    TMA: tl.constexpr,
):
    """out and lse of ROWS packed rows of one tile and key-value head.

    Grid (tiles * chunks, Hkv). K, V: pointers or descriptors with boxes [STEP, 1, DP] (TMA).
    The list is walked in steps of STEP keys: unmasked over the blocks that every row sees, then
    masked over late blocks (by entry row) and the diagonal (by position).
    """
    TOKENS: tl.constexpr = ROWS // GP
    SUB: tl.constexpr = BLOCK // STEP
    # The last tiles have the longest lists: they start first.
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
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)

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
                logits, _tanh = cap_logits(logits, cap_in, cap_out)
                factor = 1.0
            else:
                factor = scale_log2
            if MASKED or WINDOW:
                seen = seen_keys(key_start, position, token, entry, window, STEP, MASKED, WINDOW)
                logits = tl.where(seen, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1) * factor)
            if MASKED or WINDOW:
                # A row that has seen nothing yet: -inf - -inf is not a number.
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            else:
                shift = new_top
            weights = tl.exp2(logits * factor - shift[:, None])
            rescale = tl.exp2(top - shift)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc)
            top = new_top

            slot, sub = advance(slot, sub, SUB)
            column = next_column(COLUMNS, slot, size - 1)
            if MASKED:
                entry = tl.load(ENTRY + tl.minimum(slot, size - 1)) - chunk

    if SINK:
        sink_head = head * G + row % GP
        sink = tl.load(SINKS + sink_head, mask=row % GP < G, other=0.0).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.exp2(sink - shift)
        acc = acc * rescale[:, None]
        top = new_top
    # A row without keys: out 0 and lse -inf, from total 0 and top -inf.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.log2(total)) * LN2
    store_rows(OUT, acc, first_query, head, out_token, out_head, existing, G, GP, D, DP, ROWS)
    lse_rows = LSE + first_query.to(tl.int64) * lse_token + head * G + token * lse_token + row % GP
    tl.store(lse_rows, lse, mask=(token < existing) & (row % GP < G))
