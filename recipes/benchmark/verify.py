"""Is the kernel right? Asked before it is timed: a wrong one is fast for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.recipes.benchmark.steps import Problem, packed_inputs

LENGTH = 1500
"""Tokens; no multiple of a tile or a block."""

SCALES = (1.0, 4.0)
"""Factors of q: at unit scale the weights are so flat that a wrong gradient may pass."""

OUT, GRADIENT = 2.0, 3.0
"""Errors allowed, in those of a plain attention in the same dtype."""

NAMES = ("out", "dq", "dk", "dv")


class WrongResult(RuntimeError):
    """The operator does not compute what it should."""


def verify(problem: Problem, device: torch.device, backend: str | None = None) -> dict[str, Any]:
    """Output and gradients against float64 under the selection's mask.

    Returns for each scale and tensor the relative error in Frobenius norm, and that of a plain
    attention (matrix product, softmax, matrix product) in the same dtype.

    Raises:
        WrongResult: an error is past `OUT` or `GRADIENT` times the plain one, or not a number.
    """
    short = replace(problem, length=min(problem.length, LENGTH))
    errors: dict[str, Any] = {}
    for scale in SCALES:
        q, k, v, grad = packed_inputs(short, device)
        q = (q.detach() * scale).requires_grad_()
        selection = select(q, k, short.budget, block=short.block, tile=short.tile)
        mask = selection.to_mask()
        exact = _all(partial(_double, mask=mask), (q, k, v), grad, torch.float64)
        plain = _all(partial(_plain, mask=mask), (q, k, v), grad, q.dtype)
        sparse = partial(_own, selection=selection, backend=backend)
        own = _all(sparse, (q, k, v), grad, q.dtype)
        for name, true, usual, ours in zip(NAMES, exact, plain, own, strict=True):
            allowed = (OUT if name == "out" else GRADIENT) * _error(usual, true)
            error = _error(ours, true)
            errors[f"{name}, q times {scale:g}"] = {"error": error, "allowed": allowed}
            if not error <= allowed:
                raise WrongResult(
                    f"{name} of sparse attention is wrong at {short.length} tokens (q times "
                    f"{scale:g}, {short.dtype}): its relative error is {error:.2e}, where "
                    f"{allowed:.2e} is allowed; nothing was timed"
                )
    return errors


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _all(attend: Attend, inputs: tuple[Tensor, ...], grad: Tensor, dtype: torch.dtype) -> list[Any]:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(dtype))]


def _own(q: Tensor, k: Tensor, v: Tensor, selection: Selection, backend: str | None) -> Tensor:
    return sparse_attention(q, k, v, selection, backend=backend)[0]


def _double(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v, mask = _heads_first(q, k, v, mask)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v, mask = _heads_first(q, k, v, mask)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
    return q.transpose(0, 1), k, v, mask.repeat_interleave(groups, 0)


def _error(x: Tensor, true: Tensor) -> float:
    return float((x.double() - true).norm() / true.norm())
