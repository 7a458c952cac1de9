"""The definition of the selection and of the attention, in plain PyTorch and Python loops.

Written to be read against the design and to be right in float64, not to be fast: every other
implementation is held against this one. It shares no code with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from lit_sparse.attention.selection import Selection
from lit_sparse.budget import Budget

KeptBlocks = dict[tuple[int, int, int], list[tuple[int, int]]]
"""(document, kv head, tile) -> sorted (block, first row of the tile that sees it)."""


def select_blocks(
    q: Tensor,
    k: Tensor,
    budget: Budget,
    lengths: Sequence[int],
    *,
    key_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    block: int = 64,
    tile: int = 16,
) -> KeptBlocks:
    """The kept blocks of every tile, by the rules of the design one after the other.

    Args:
        q: [T, Hq, D]; k: [Tk, Hkv, D]. Scores are computed in their dtype.
        lengths: queries of each document; `key_lengths`: its keys, if they are more.
    """
    key_lengths = lengths if key_lengths is None else key_lengths
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    kept: KeptBlocks = {}
    q_begin = k_begin = 0
    for document, (queries, keys) in enumerate(zip(lengths, key_lengths, strict=True)):
        for head in range(heads):
            own_q = q[q_begin : q_begin + queries, head * groups : (head + 1) * groups]
            own_k = k[k_begin : k_begin + keys, head]
            lists = _select_document(own_q, own_k, budget, scale, block, tile)
            kept |= {(document, head, t): entries for t, entries in enumerate(lists)}
        q_begin, k_begin = q_begin + queries, k_begin + keys
    return kept


def _select_document(
    q: Tensor, k: Tensor, budget: Budget, scale: float, block: int, tile: int
) -> list[list[tuple[int, int]]]:
    """q [L, G, D], k [Lk, D] of one document and key-value head."""
    cached = len(k) - len(q)
    local, late_share = Fraction(str(budget.local)), Fraction(str(budget.late))

    def masses(row: int) -> Tensor:
        """Softmax mass of each block complete before the row's tile starts, over G heads."""
        t0 = cached + row // tile * tile
        complete = t0 // block
        means = k[: complete * block].view(complete, block, -1).mean(1)
        logits = scale * (q[row] @ means.T) + math.log(block)
        return logits.softmax(-1).sum(0)

    lists = []
    for first in range(0, len(q), tile):
        t0 = cached + first
        n = t0 + tile
        keys = budget(n)
        visible = _ceil_div(n, block)
        window = max(math.ceil(local * max(keys - budget.sink, 0)), tile + block)
        always = set(range(_ceil_div(budget.sink, block))) & set(range(visible))
        always |= set(range(max(t0 - window, 0) // block, visible))
        size = max(_ceil_div(keys, block), len(always))
        exists = range(_ceil_div(min(n, len(k)), block))
        if size >= visible:
            lists.append([(b, 0) for b in exists])
            continue

        candidates = [b for b in range(visible) if b not in always]
        slots = size - len(always)
        late = math.floor(late_share * slots)
        rows = [*range(max(first - tile, 0), first), first]
        recent = [masses(row).tolist() for row in rows]
        needed = [sum(mass[b] for mass in recent) for b in candidates]
        base = _best(candidates, needed, slots - late)

        entries = dict.fromkeys([*always, *base], 0)
        others = [b for b in candidates if b not in base]
        asked: dict[int, int] = {}
        for slot in range(late):
            row = (2 * slot + 1) * tile // (2 * late)
            asked[row] = asked.get(row, 0) + 1
        for row, wishes in sorted(asked.items()):
            if first + row < len(q):
                wanted = masses(first + row)
                for b in _best(others, [float(wanted[b]) for b in others], wishes):
                    entries.setdefault(b, row)
        lists.append(sorted((b, row) for b, row in entries.items() if b in exists))
    return lists


def _best(blocks: list[int], scores: list[float], count: int) -> list[int]:
    ranked = sorted(zip(blocks, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return [b for b, _ in ranked[:count]]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Selection,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each row over the keys that the mask keeps.

    Args:
        q: [T, Hq, D]; k, v: [Tk, Hkv, D].
        mask: bool [Hkv or Hq or 1, T, Tk], or a Selection (its `to_mask`). Quadratic memory.
        window: with a Selection, how many of the nearest keys a row sees, its own included.
        softcap: logits are softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
        sinks: [Hq], a logit of each head that takes its share of the softmax and gives no value
            (gpt-oss, arXiv 2508.10925).

    Returns:
        out [T, Hq, D] in q's dtype and lse [T, Hq], the log of the softmax's denominator, sink
        included, in float32 or float64; a row without keys gives out = 0, without a sink lse =
        -inf.
    """
    if isinstance(mask, Selection):
        mask = mask.to_mask(window)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    if mask.shape[0] == k.shape[1]:
        mask = mask.repeat_interleave(groups, 0)
    logits = _logits(q.to(dtype), k.to(dtype), scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype)[:, None])
    # Rows that keep nothing: exp(-inf - 0) is 0 where exp(-inf - -inf) is not a number.
    weights = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    out = weights @ v.to(dtype).transpose(0, 1).repeat_interleave(groups, 0)
    return out.transpose(0, 1).to(q.dtype), lse.detach().T


def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, budget: Budget | int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The paper's own definition: each row of each head keeps its `budget(n)` largest entries.

    The yardstick of what any selection of that size can reach (arXiv 2404.02690): one document,
    q [T, Hq, D], k, v [T, Hkv, D]; ties go to the lower key. Returns what `attention` does.
    """
    if isinstance(budget, int):
        budget = Budget.fixed(budget)
    length, scale = len(q), q.shape[-1] ** -0.5 if scale is None else scale
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = _logits(q.detach().to(dtype), k.detach().to(dtype), scale)
    order = (
        logits.masked_fill(~causal, float("-inf"))
        .sort(dim=-1, descending=True, stable=True)
        .indices
    )
    rank = torch.arange(length, device=q.device)
    allowed = budget(rank + 1)
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask.scatter_(-1, order, (rank < allowed[:, None]).expand_as(mask))
    return attention(q, k, v, mask & causal, scale)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """[Hq, T, Tk]"""
    keys = k.transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
    return scale * (q.transpose(0, 1) @ keys.transpose(1, 2))
