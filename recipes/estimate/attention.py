"""What sparse attention allocates and saves on a GPU, for tensors without memory.

Selection, forward and backward are those of the Triton backend, whose kernels are not started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_sparse.attention import Selection
from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import Plan
from lit_sparse.recipes.estimate.live import LiveBytes

_NAME = "lit_sparse_estimate"
"""In transformers' registry, and of the attribute on attention modules."""

_TARGET = "sm_80"
"""GPU generation whose launch table is read. Hopper's differs by tensor descriptors, which need the
tensors' addresses and no memory to speak of.
"""


@dataclass(frozen=True)
class Counted:
    """The attention of one rank.

    Args:
        live: who counts; as "selection" what making the lists takes, else as "attention".
        plan: of the whole row.
        sequence: ranks that share the row: each attends over all its tokens with a part of the
            heads.
    """

    live: LiveBytes
    plan: Plan
    sequence: int = 1

    @classmethod
    def of(cls, live: LiveBytes, plan: Plan, sequence: int = 1) -> Counted:
        # Its own object: tables of tensors without memory must not stay with the real plan.
        return cls(live, replace(plan), sequence)

    def exchange(self, x: Tensor, gather: bool) -> Tensor:
        """DeepSpeed Ulysses' all-to-all of [tokens, heads, D]: to all tokens and a part of the
        heads, or back. What is sent, what arrives and its rearranged copy exist at a time.
        """
        if self.sequence == 1:
            return x
        tokens, heads, dim = x.shape
        n = self.sequence
        shape = (tokens * n, heads // n, dim) if gather else (tokens // n, heads * n, dim)
        sent = x.clone()
        return torch.empty_like(sent).reshape(shape).clone()


def count_attention(decoder: Any, counted: Counted) -> None:
    """Have the layers of a transformers decoder call this attention.

    Raises:
        NotImplementedError: Triton is not installed, or the kernels have no such head_dim.
    """
    from transformers import AttentionInterface

    if find_spec("triton") is None:
        raise NotImplementedError(
            "the memory of attention is that of the Triton kernels, but triton is not installed: "
            "pip install triton (on Linux)"
        )
    from lit_sparse.attention.triton.backend import DIMS

    config = decoder.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if dim > DIMS[1]:
        raise NotImplementedError(
            f"the memory of attention is that of the Triton kernels, which have no head_dim {dim}"
        )
    AttentionInterface.register(_NAME, _forward)
    decoder.config._attn_implementation = _NAME
    for layer in decoder.layers:
        setattr(layer.self_attn, _NAME, counted)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The contract of transformers' `AttentionInterface`."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    scale = scaling or query.shape[-1] ** -0.5
    return _Attention.apply(q, k, v, getattr(module, _NAME), scale)[None], None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, counted: Counted, scale: float
    ) -> Tensor:
        from lit_sparse.attention.triton import backend
        from lit_sparse.attention.triton.run import recorded
        from lit_sparse.attention.triton.select import select

        ctx.counted, ctx.scale = counted, scale
        plan = counted.plan
        with recorded(_TARGET), counted.live.named("attention"):
            q, k, v = (counted.exchange(x, gather=True) for x in (q, k, v))
            with counted.live.named("selection"):
                selection = select(q, k, plan, scale)
            lists: Sequence[Tensor] = ()
            if plan.keeps_everything:
                out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
            else:
                out, lse = backend.forward(q, k, v, None, selection, Options(scale))
                lists = (selection.columns, selection.entry)
            ctx.save_for_backward(q, k, v, out, lse, *lists)
            return counted.exchange(out, gather=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from lit_sparse.attention.triton import backend
        from lit_sparse.attention.triton.run import recorded

        counted: Counted = ctx.counted
        q, k, v, out, lse, *lists = ctx.saved_tensors
        with recorded(_TARGET), counted.live.named("attention"):
            grad = counted.exchange(grad, gather=True)
            if counted.plan.keeps_everything:
                grads = _flash_backward(q, k)
            else:
                selection = Selection(counted.plan, *lists)
                options = Options(ctx.scale)
                grads = backend.backward(grad, q, k, v, None, out, lse, selection, options)[:3]
            return *(counted.exchange(x, gather=False) for x in grads), None, None


def _flash_backward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What FlashAttention-2's backward allocates: float32 sums of dq and of each row, dk and dv of
    every query head.
    """
    sums = torch.empty(q.shape, dtype=torch.float32, device=q.device), q[..., 0].float()
    by_head = torch.empty_like(q), torch.empty_like(q)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    del sums, by_head
    return dq, dk, dv
