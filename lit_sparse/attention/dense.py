"""Dense causal attention of packed documents, with its log-sum-exp: the fallback.

On the CPU PyTorch's flash kernel; on CUDA cuDNN's on Hopper where it takes the shape (it is the
faster one there), else flash. Their backward on CUDA adds dq atomically: unlike the sparse kernels
it does not repeat bit for bit.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention.plan import Plan, to_device


def has_kernel(q: Tensor, plan: Plan) -> bool:
    """Whether PyTorch has a dense kernel with an lse for such tensors and lengths."""
    if q.device.type == "cpu":
        return True
    # Of more keys than queries CUDA kernels differ in where the diagonal lies.
    return plan.queries == plan.keys and q.dtype in (torch.bfloat16, torch.float16)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """Every document by itself through PyTorch's fastest kernel.

    q [T, Hq, D], k, v [Tk, Hkv, D]. Returns out [T, Hq, D] and lse [T, Hq]; differentiable.
    """
    if q.device.type == "cuda" and len(q):
        return _on_cuda(q, k, v, plan, scale)
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


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    lengths = np.diff(plan.queries)
    longest = int(lengths.max())
    if (lengths == longest).all():
        batch = [_batch(x, len(lengths)) for x in (q, k, v)]
        if _cudnn_takes(*batch):
            cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
            out, lse = cudnn(*batch, None, True, 0.0, True, False, scale=scale)[:2]
            lse = lse.reshape(len(lengths), q.shape[1], longest)
            return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    boundaries = plan.cache.get(("cu_seqlens", q.device))
    if boundaries is None:
        boundaries = to_device(np.asarray(plan.queries, dtype=np.int32), q.device)
        plan.cache["cu_seqlens", q.device] = boundaries
    flash = torch.ops.aten._flash_attention_forward
    out, lse = flash(
        q, k, v, boundaries, boundaries, longest, longest, 0.0, True, False, scale=scale
    )[:2]
    return out, lse.T if lse.shape == (q.shape[1], q.shape[0]) else lse


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN runs causal attention on [B, H, S, D], and is the faster one: on Hopper."""
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    return torch.backends.cuda.can_use_cudnn_attention(params)


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
