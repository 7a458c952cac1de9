"""sparse_attention(): one call for every backend, with gradients."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_sparse.attention import cpu, dense, reference
from lit_sparse.attention.options import Options
from lit_sparse.attention.selection import Selection

BACKENDS = ("triton", "cpu", "reference")


# A plan is host arithmetic, which torch.compile would trace in pieces. Models have an operator.
@torch.compiler.disable
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float | None = None,
    backend: str | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the causal keys of its tile's kept blocks.

    Args:
        q: [T, Hq, D], packed documents.
        k, v: [Tk, Hkv, D]; Hkv divides Hq.
        selection: from `select` on q and k of the same lengths and number of key-value heads.
        scale: softmax scale; None: D ** -0.5.
        backend: "triton" (CUDA, bfloat16 or float16), "cpu" or "reference" (quadratic memory, any
            device and dtype); None: by device, and PyTorch's dense kernel where the lengths alone
            say that the selection keeps everything.
        window: how many of the nearest keys a row sees, its own included: a token-exact sliding
            window inside the kept blocks (`select` with the same `window` keeps what it needs).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        sinks: [Hq], a logit of each head that takes its share of the softmax and gives no value
            (gpt-oss); differentiable.

    Returns:
        out [T, Hq, D] in q's dtype; lse [T, Hq], the log of each row's softmax denominator (kept
        keys and sink) in float32 (float64 for float64 inputs), not differentiable.

    Raises:
        ValueError: shapes do not fit the selection, or the backend cannot take these tensors.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = Options(scale, window, softcap)
    _check(q, k, v, sinks, selection, backend)
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.attention(
                q, k, v, selection, scale, window=window, softcap=softcap, sinks=sinks
            )
    if runs_dense(q, sinks, selection, options, backend):
        out, lse = dense.dense_attention(q, k, v, selection.plan, scale)
        return out, lse.detach()
    backend = backend or default_backend(q.device)
    get_backend(backend).check(q, sinks, selection, options)
    return _SparseAttention.apply(q, k, v, sinks, selection, options, backend)


def runs_dense(
    q: Tensor, sinks: Tensor | None, selection: Selection, options: Options, backend: str | None
) -> bool:
    """Whether PyTorch's dense kernel computes the same and is faster: by lengths alone."""
    plan = selection.plan
    whole = plan.keeps_everything and options.softcap is None and sinks is None
    if options.window is not None:
        whole = whole and options.window >= np.diff(plan.keys).max(initial=0)
    return backend is None and whole and dense.has_kernel(q, plan)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        selection: Selection,
        options: Options,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        # Autocast would round single products to bfloat16.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = get_backend(backend).forward(q, k, v, sinks, selection, options)
        # The lists too: activation checkpointing lets go of saved tensors, and of nothing else. A
        # selection that was made in inference mode cannot be saved as it is.
        lists = [x.clone() if x.is_inference() else x for x in (selection.columns, selection.entry)]
        ctx.save_for_backward(q, k, v, sinks, out, lse, *lists)
        ctx.plan, ctx.options, ctx.backend = selection.plan, options, backend
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, columns, entry = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            # Its own object, so that what it derives from the lists goes with it.
            selection = Selection(ctx.plan, columns, entry)
            grads = get_backend(ctx.backend).backward(grad_out, *tensors, selection, ctx.options)
        return *grads, None, None, None


def default_backend(device: torch.device) -> str:
    """The backend of a device's tensors where none is named."""
    return "cpu" if device.type == "cpu" else "triton"


def get_backend(name: str) -> ModuleType:
    """The module of a backend, with `check`, `forward` and `backward`; Triton loads when used."""
    if name == "cpu":
        return cpu
    return import_module("lit_sparse.attention.triton")


def check_backend(backend: str | None) -> None:
    """Raise a ValueError unless the name is that of a backend, or None."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    selection: Selection,
    backend: str | None,
) -> None:
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
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise ValueError(
            f"sinks must be [{q.shape[1]}] on {q.device}, one logit a query head, got "
            f"{tuple(sinks.shape)} on {sinks.device}"
        )
    if q.device.type not in ("cpu", "cuda") and backend != "reference":
        raise ValueError(f"no backend for {q.device.type} tensors: pass CPU or CUDA tensors")
    if selection.columns.device != q.device:
        raise ValueError(f"the selection is on {selection.columns.device}, q on {q.device}")
