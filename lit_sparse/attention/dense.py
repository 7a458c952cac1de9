"""Dense causal attention of packed documents, with its log-sum-exp: the fallback."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from lit_sparse.attention.plan import Plan


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """Every document by itself through PyTorch's flash kernel; neighbours of one length in one
    call.

    q [T, Hq, D], k, v [Tk, Hkv, D] on the CPU. Returns out [T, Hq, D] and lse [T, Hq];
    differentiable.
    """
    groups = q.shape[1] // k.shape[1]
    lengths = [
        (plan.queries[d + 1] - plan.queries[d], plan.keys[d + 1] - plan.keys[d])
        for d in range(len(plan.queries) - 1)
    ]
    outs, lses, q_begin, k_begin = [], [], 0, 0
    for (queries, keys), same in groupby(lengths):
        count = len(list(same))
        q_end, k_end = q_begin + count * queries, k_begin + count * keys
        if queries:
            out, lse = _causal(
                _batch(q[q_begin:q_end], count),
                _batch(k[k_begin:k_end], count).repeat_interleave(groups, 1),
                _batch(v[k_begin:k_end], count).repeat_interleave(groups, 1),
                scale,
            )
            outs.append(out.transpose(1, 2).reshape(count * queries, *q.shape[1:]))
            lses.append(lse.transpose(1, 2).reshape(count * queries, q.shape[1]))
        q_begin, k_begin = q_end, k_end
    if not outs:
        # Of no rows, but part of the graph as ever.
        empty = q + 0 * (k.sum() + v.sum())
        return empty, empty.new_zeros(
            q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)
        )
    return torch.cat(outs), torch.cat(lses)


def _batch(x: Tensor, count: int) -> Tensor:
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D], k, v [B, H, Sk, D]; the queries are the last S of the Sk positions."""
    queries, keys = q.shape[2], k.shape[2]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if queries == keys:
        return flash(q, k, v, 0.0, True, scale=scale)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return flash(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
