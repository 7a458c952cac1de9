"""What the attention benchmark compares: one forward and backward, sparse and dense."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.budget import Budget

DTYPES = ("float32", "bfloat16", "float16", "float64")
SEED = 0

Times = dict[str, float]
"""Part of a step -> seconds."""


@dataclass(frozen=True)
class Problem:
    """One document of random tokens, and the law it is attended under.

    Args:
        length: tokens.
        heads: query heads; kv_heads: key-value heads, which divide them.
        dtype: one of `DTYPES`.
        tile: None for the operator's default.
    """

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    budget: Budget
    block: int
    tile: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Problem:
        return cls(**{**stored, "budget": Budget(**stored["budget"])})


def packed_inputs(problem: Problem, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v (with gradients) and the gradient of the output, [T, H, D], from a fixed seed."""
    generator = torch.Generator(device).manual_seed(SEED)

    def draw(heads: int) -> Tensor:
        shape = (problem.length, heads, problem.head_dim)
        x = torch.randn(shape, generator=generator, device=device)
        return x.to(getattr(torch, problem.dtype))

    q, k, v = draw(problem.heads), draw(problem.kv_heads), draw(problem.kv_heads)
    return *(x.requires_grad_() for x in (q, k, v)), draw(problem.heads)


def dense_inputs(problem: Problem) -> tuple[Tensor, ...]:
    """The same values in the layout of PyTorch's attention: [1, H, T, D], contiguous."""
    tensors = [x.detach().transpose(0, 1).contiguous()[None] for x in packed_inputs(problem)]
    return *(x.requires_grad_() for x in tensors[:3]), tensors[3]


def sparse_step(problem: Problem, inputs: tuple[Tensor, ...]) -> tuple[Times, Selection]:
    """Selection, forward and backward."""
    q, k, v, grad = inputs
    begin = time.perf_counter()
    selection = select(q, k, problem.budget, block=problem.block, tile=problem.tile)
    selected = time.perf_counter()
    out, _ = sparse_attention(q, k, v, selection)
    forwarded = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), grad)
    end = time.perf_counter()
    times = {
        "selection": selected - begin,
        "forward": forwarded - selected,
        "backward": end - forwarded,
        "total": end - begin,
    }
    return times, selection


def dense_step(inputs: tuple[Tensor, ...]) -> Times:
    """Forward and backward of causal scaled dot product attention, heads grouped."""
    q, k, v, grad = inputs
    begin = time.perf_counter()
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    forwarded = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), grad)
    end = time.perf_counter()
    return {"forward": forwarded - begin, "backward": end - forwarded, "total": end - begin}


def causal_pairs(selection: Selection) -> int:
    """(query, key) pairs of one head in dense causal attention of one document: n (n + 1) / 2."""
    length = selection.plan.queries[-1]
    return length * (length + 1) // 2


def executed_pairs(selection: Selection) -> int:
    """Pairs of one head that a backend of gathered blocks computes.

    Every listed block counts whole, in every row of its tile: masked pairs, rows past the
    document's end and late slots left empty are work too. Where the lengths alone say that nothing
    is dropped, PyTorch's causal kernel runs instead, and the causal pairs are what it computes.
    """
    if selection.keeps_everything:
        return causal_pairs(selection)
    return int(selection.plan.offsets[-1]) * selection.block * selection.tile
