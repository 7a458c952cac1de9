"""sparse_attention(): one call for every backend, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_sparse.attention import cpu, reference
from lit_sparse.attention.dense import dense_attention
from lit_sparse.attention.selection import Selection

BACKENDS = ("cpu", "reference")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the causal keys of its tile's kept blocks.

    Args:
        q: [T, Hq, D], packed documents.
        k, v: [Tk, Hkv, D]; Hkv divides Hq.
        selection: from `select` on q and k of the same lengths and number of key-value heads.
        scale: softmax scale; None: D ** -0.5.
        backend: "cpu" or "reference" (quadratic memory, any device and dtype); None: by device, and
            PyTorch's dense kernel where the lengths alone say that the selection keeps everything.

    Returns:
        out [T, Hq, D] in q's dtype; lse [T, Hq], the log-sum-exp of each row's kept logits in
        float32 (float64 for float64 inputs), not differentiable.

    Raises:
        ValueError: shapes do not fit the selection, or the backend cannot take these tensors.
    """
    _check(q, k, v, selection, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.attention(q, k, v, selection, scale)
    if backend is None and selection.keeps_everything:
        out, lse = dense_attention(q, k, v, selection.plan, scale)
        return out, lse.detach()
    return _SparseAttention.apply(q, k, v, selection, scale)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float
    ) -> tuple[Tensor, Tensor]:
        # Autocast would round single products to bfloat16.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = cpu.forward(q, k, v, selection, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.selection, ctx.scale = selection, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            grads = cpu.backward(grad_out, q, k, v, out, lse, ctx.selection, ctx.scale)
        return *grads, None, None


def check_backend(backend: str | None) -> None:
    """Raise a ValueError unless the name is that of a backend, or None."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")


def _check(q: Tensor, k: Tensor, v: Tensor, selection: Selection, backend: str | None) -> None:
    plan = selection.plan
    check_backend(backend)
    for name, x, tokens in (
        ("q", q, plan.queries[-1]),
        ("k", k, plan.keys[-1]),
        ("v", v, plan.keys[-1]),
    ):
        if x.dim() != 3 or x.shape[0] != tokens:
            raise ValueError(
                f"{name} must be [tokens, heads, head_dim] with the selection's {tokens} tokens, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"q, k and v must share a floating dtype and a device: {name} is {x.dtype} on "
                f"{x.device}, q {q.dtype} on {q.device}"
            )
    if k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k and v must have one shape, and q their head_dim: q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    heads = len(selection.columns)
    if k.shape[1] != heads or q.shape[1] % heads:
        raise ValueError(
            f"the selection is for {heads} key-value heads: k has {k.shape[1]}, q {q.shape[1]}"
        )
    if backend != "reference" and q.device.type != "cpu":
        raise ValueError(
            f"no backend for {q.device.type} tensors in this version: pass CPU tensors, or "
            "backend='reference' (quadratic memory)"
        )
