"""The working-set selection: what the recent past needed and what the tile's queries ask for.

A list shared by a tile and scored by all its rows would let later tokens choose what earlier ones
see, which is a label leak. Here a tile's base is scored by the `tile` rows before it and its first
row; its late blocks enter at the row that asked for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention.layout import key_blocks
from lit_sparse.attention.options import check_window
from lit_sparse.attention.plan import Plan, late_rows, make_plan
from lit_sparse.attention.scores import RowScores, Scorer, get_scorer
from lit_sparse.attention.selection import Selection
from lit_sparse.budget import Budget

_STRIP_BYTES = 8 * 2**20
"""Row scores that exist at a time: rows are scored in strips of whole tiles."""

_warned: set[tuple[Budget, int, int]] = set()


# A plan is host arithmetic, which torch.compile would trace in pieces. Models have an operator.
@torch.compiler.disable
@torch.no_grad()
def select(
    q: Tensor,
    k: Tensor,
    budget: Budget,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    cu_seqlens_k: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    block: int = 64,
    tile: int | None = None,
    score: str | RowScores | Scorer = "mass",
    backend: str | None = None,
    *,
    window: int | None = None,
) -> Selection:
    """Choose the key blocks that each tile of queries attends to.

    Deterministic, causal for every row, without gradient; the same for a document alone or packed.

    Args:
        q: [T, Hq, D], packed documents.
        k: [Tk, Hkv, D]; Hkv divides Hq.
        budget: the law k(n).
        cu_seqlens: [documents + 1], boundaries of the documents in q; None: one document. A
            sequence of ints saves the copy from the device.
        cu_seqlens_k: the same in k, if a document has more keys than queries (cached decoding): the
            queries are its last ones.
        scale: softmax scale; None: D ** -0.5.
        block: keys of a block; a power of two.
        tile: queries of a tile; a power of two. None: the largest power of two <= 128 / G within
            [16, 64]. Where no document has more than one query (a decoding step) a tile is that
            row.
        score: "mass", "mean", "variance", "minmax", "exact", or a callable (`scores.RowScores`)
            that gets the complete blocks [H, N, block, D] themselves.
        backend: "triton" (CUDA, score="mass") or "torch" (any device and scorer); None: "triton"
            where it can.
        window: of a layer that sees its nearest `window` keys and no others (the `window` of
            `sparse_attention`): the blocks that hold them are kept, whatever the budget.

    Raises:
        ValueError: shapes, boundaries, block, tile, score or window do not fit; the message names
            the argument.
    """
    check_shapes(q, k)
    if not isinstance(budget, Budget):
        raise ValueError(f"budget must be a Budget, such as Budget.fixed(1024), got {budget!r}")
    queries = boundaries("cu_seqlens", cu_seqlens, q.shape[0])
    if cu_seqlens_k is None and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k has {k.shape[0]} tokens and q {q.shape[0]}: give cu_seqlens_k where they differ"
        )
    keys = queries if cu_seqlens_k is None else boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    _check(queries, keys, block, tile)
    check_window(window)
    scorer = get_scorer(score)

    groups = q.shape[1] // k.shape[1]
    tile = tile_of(tile, queries, keys, groups)
    plan = make_plan(queries, keys, budget, block, tile, window)
    if plan.raised_to and (budget, block, tile) not in _warned:
        _warned.add((budget, block, tile))
        warnings.warn(
            f"{budget} is below what is always kept (sink and local window, in whole blocks of "
            f"{block}): with tile={tile} the effective minimum is {plan.raised_to} keys",
            stacklevel=4,
        )

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _wants_triton(backend, q, k, block, score):
        from lit_sparse.attention.triton.select import select as triton_select

        return triton_select(q, k, plan, scale)
    heads = k.shape[1]
    columns = plan.columns.to(q.device).repeat(heads, 1)  # a copy: the plan is shared
    entry = torch.zeros_like(columns)
    if plan.chooses:
        # Autocast would round the scores to bfloat16.
        with torch.autocast(q.device.type, enabled=False):
            base, late, late_entry = _choose(q, k, plan, scorer, scale)
        columns[:, plan.base_slots.to(q.device)] = base
        columns[:, plan.late_slots.to(q.device)] = late
        entry[:, plan.late_slots.to(q.device)] = late_entry
    return Selection(plan, columns, entry)


def _wants_triton(
    backend: str | None, q: Tensor, k: Tensor, block: int, score: str | RowScores | Scorer
) -> bool:
    """Whether the Triton kernels select; a ValueError where they are asked for and cannot."""
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"backend of the selection must be 'triton' or 'torch', got {backend!r}")
    if backend == "torch" or (backend is None and q.device.type != "cuda"):
        return False
    from lit_sparse.attention.triton.backend import check_tensors

    try:
        check_tensors(q, k.shape[1], block)
        if score != "mass":
            raise ValueError(f"score={score!r} has no Triton kernel: pass backend='torch'")
    except ValueError:
        if backend is not None:
            raise
        return False
    return True


def tile_of(tile: int | None, queries: tuple[int, ...], keys: tuple[int, ...], groups: int) -> int:
    """Queries of a tile, as `select` documents it: the size asked for, the default, or one row."""
    if np.diff(queries).max(initial=0) <= 1 and queries != keys:
        return 1
    return default_tile(groups) if tile is None else tile


def default_tile(groups: int) -> int:
    """Queries of a tile for G = `groups` query heads a key-value head: about 128 rows in all."""
    tile = 64
    while tile > 16 and tile * groups > 128:
        tile //= 2
    return tile


def _choose(
    q: Tensor, k: Tensor, plan: Plan, scorer: Scorer, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Base columns, late columns and late entries of all sparse tiles, int32 [Hkv, slots of the
    kind].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    blocks = key_blocks(k, plan).to(dtype)
    heads, dim = k.shape[1], k.shape[2]
    groups = q.shape[1] // heads
    chosen: list[tuple[Tensor, Tensor, Tensor]] = []
    for document in range(len(plan.queries) - 1):
        first, last = (int(t) for t in plan.first_tile[document : document + 2])
        sparse = np.flatnonzero(plan.sparse[first:last])
        if not len(sparse):
            continue
        # A document is scored by itself: matrix products round by shape, and its blocks must not
        # depend on what it is packed with. The tile before the first sparse one is that one's
        # recent past.
        first, last = first + max(int(sparse[0]) - 1, 0), first + int(sparse[-1]) + 1
        begin, end = int(plan.row_start[first]), plan.queries[document + 1]
        rows = (last - first) * plan.tile
        padded = q.new_zeros(heads, rows, groups, dim, dtype=dtype)
        real = min(end - begin, rows)
        padded[:, :real] = q[begin : begin + real].unflatten(1, (heads, groups)).transpose(0, 1)
        own = blocks[:, int(plan.first_block[document]) : int(plan.first_block[document + 1])]
        summary = scorer.prepare(own[:, : int(plan.complete[last - 1])])
        chosen += _choose_document(padded, summary, plan, first, last, scorer, scale)
    base, late, entry = zip(*chosen, strict=True)
    return torch.cat(base, 1), torch.cat(late, 1), torch.cat(entry, 1)


def _choose_document(
    q: Tensor, summary: Tensor, plan: Plan, first: int, last: int, scorer: Scorer, scale: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same for tiles [first, last) of one document, strip by strip.

    q: [Hkv, (last - first) * tile, G, D]; summary: [Hkv, complete blocks, ...].
    """
    heads, _, groups, _ = q.shape
    width = summary[0, 0].numel() // q.shape[-1] if summary.shape[1] else 1
    row_bytes = heads * groups * max(summary.shape[1], 1) * max(width, 1) * q.element_size()
    strip = max(_STRIP_BYTES // (row_bytes * plan.tile), 1)
    chosen = []
    past = q.new_zeros(heads, 0)
    for begin in range(first, last, strip):
        stop = min(begin + strip, last)
        blocks = int(plan.complete[stop - 1])
        visible = torch.from_numpy(plan.complete[begin:stop]).to(q.device)
        hidden = torch.arange(blocks, device=q.device) >= visible[:, None]
        rows = q[:, (begin - first) * plan.tile : (stop - first) * plan.tile]
        scores = scorer.rows(
            rows, summary[:, :blocks], hidden.repeat_interleave(plan.tile, 0), scale
        ).unflatten(1, (stop - begin, plan.tile))
        # What a broken activation scores is decided by index, so that the lists stay well formed.
        # Finite sums, above the -inf of what is no candidate.
        limit = torch.finfo(scores.dtype).max / (4 * plan.tile)
        scores = scores.nan_to_num(nan=0.0, posinf=limit, neginf=-limit)
        recent = torch.zeros_like(scores[:, :, 0])
        recent[:, 0, : past.shape[1]] = past
        recent[:, 1:] = scores[:, :-1].sum(2)
        past = scores[:, -1].sum(1)
        chosen.append(_choose_strip(scores, recent, plan, begin, stop))
    return chosen


def _choose_strip(
    scores: Tensor, recent: Tensor, plan: Plan, begin: int, stop: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for tiles [begin, stop) from their row scores.

    scores: [Hkv, tiles, tile, blocks]; recent: [Hkv, tiles, blocks], summed over the tile before.
    """
    device, blocks = scores.device, scores.shape[-1]
    number = torch.arange(blocks, device=device)

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[begin:stop]).to(device)

    sink_end = on_device(plan.counts[:, 0])
    candidate = (number >= sink_end[:, None]) & (number < on_device(plan.first_local)[:, None])
    candidate &= on_device(plan.sparse)[:, None]

    ranked = (recent + scores[:, :, 0]).masked_fill(~candidate, float("-inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    in_base = torch.zeros_like(ranked, dtype=torch.bool)
    in_base.scatter_(-1, order, (number < on_device(plan.base)[:, None]).expand_as(order))
    base = in_base.nonzero()[:, 2].view(len(scores), -1).to(torch.int32)

    late = plan.late[begin:stop]
    starts = np.concatenate([[0], np.cumsum(late)])
    columns = torch.full((len(scores), int(starts[-1])), -1, dtype=torch.int32, device=device)
    entry = torch.full_like(columns, plan.tile)
    eligible = candidate & ~in_base
    for slots in np.unique(late[late > 0]):
        tiles = np.flatnonzero(late == slots)
        place = torch.from_numpy(starts[tiles][:, None] + np.arange(slots)).to(device)
        exists = torch.from_numpy(plan.rows[begin + tiles]).to(device)
        picked, asked = _ask(
            scores, eligible, torch.from_numpy(tiles).to(device), int(slots), exists
        )
        columns[:, place], entry[:, place] = picked, asked
    return base, columns, entry


def _ask(
    scores: Tensor, eligible: Tensor, tiles: Tensor, slots: int, exists: Tensor
) -> tuple[Tensor, Tensor]:
    """Late columns and entries of the given tiles, int32 [Hkv, tiles, slots].

    eligible: bool [Hkv, strip, blocks], candidates outside the base; exists: rows that each tile
        has.
    """
    size = scores.shape[2]
    rows = torch.tensor(late_rows(slots, size), device=scores.device)
    asking, times = rows.unique(return_counts=True)
    wishes = scores[:, tiles][:, :, asking].masked_fill(
        ~eligible[:, tiles][:, :, None], float("-inf")
    )
    picks = []
    for _ in range(int(times.max())):
        best = wishes.argmax(-1, keepdim=True)  # the first of equals
        picks.append(best)
        wishes.scatter_(-1, best, float("-inf"))
    # The first times[i] wishes of asking row i, row after row.
    wish = torch.arange(len(picks), device=scores.device) < times[:, None]
    columns = torch.cat(picks, -1)[:, :, wish].to(torch.int32)
    entry = rows.to(torch.int32).expand_as(columns).clone()

    repeated = (columns[..., :, None] == columns[..., None, :]).tril(-1).any(-1)
    empty = repeated | (rows >= exists[:, None])
    return columns.masked_fill_(empty, -1), entry.masked_fill_(empty, size)


def boundaries(name: str, cu_seqlens: Tensor | Sequence[int] | None, total: int) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (0, total)
    bounds = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
    if not all(isinstance(b, (int, np.integer)) for b in bounds):
        raise ValueError(f"{name} must be a flat sequence of whole numbers, got {cu_seqlens!r}")
    bounds = tuple(int(b) for b in bounds)
    if not bounds or bounds[0] != 0 or bounds[-1] != total:
        ends = f"{bounds[0]} to {bounds[-1]}" if bounds else "empty"
        raise ValueError(f"{name} must run from 0 to the {total} tokens given, got {ends}")
    if any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"{name} must not fall, got {bounds}")
    return bounds


def check_shapes(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating [tokens, heads, head_dim], got {_describe(x)}"
            )
    if q.shape[2] != k.shape[2] or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q and k must agree in head_dim, dtype and device: q {_describe(q)}, k {_describe(k)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the {k.shape[1]} heads of k must divide the {q.shape[1]} heads of q "
            "(grouped-query attention)"
        )


def _check(queries: tuple[int, ...], keys: tuple[int, ...], block: int, tile: int | None) -> None:
    check_power_of_two("block", block)
    if tile is not None:
        check_power_of_two("tile", tile)
    if len(queries) != len(keys):
        raise ValueError(
            f"cu_seqlens has {len(queries) - 1} documents and cu_seqlens_k {len(keys) - 1}"
        )
    if queries is not keys and (np.diff(keys) < np.diff(queries)).any():
        worst = int((np.diff(keys) - np.diff(queries)).argmin())
        raise ValueError(f"document {worst} of cu_seqlens_k has fewer keys than queries")


def check_power_of_two(name: str, value: int) -> None:
    """Raise a ValueError that names the argument unless `value` is a positive power of two."""
    if not isinstance(value, int) or value < 1 or value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value!r}")


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"
