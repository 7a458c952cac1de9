"""What `sparse_attention` calls: the checks, the launches of forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from lit_sparse.attention.options import Options
from lit_sparse.attention.selection import Selection
from lit_sparse.attention.triton.config import Rows, launch, padded_dim
from lit_sparse.attention.triton.dkdv import dkdv_kernel, reduce_kernel, statistics_kernel
from lit_sparse.attention.triton.dq import dq_kernel
from lit_sparse.attention.triton.forward import forward_kernel
from lit_sparse.attention.triton.run import run
from lit_sparse.attention.triton.tables import BLOCK_FIELDS, TILE_FIELDS, Tables, tables
from lit_sparse.attention.triton.work import ITEM_FIELDS, Work, make_work

DIMS = (16, 256)
"""Least and largest head_dim; any multiple of 16 between is computed, padded to a power of two."""

LEAST_BLOCK = 16
"""Keys of a block, at least: a matrix product's least."""

MOST_GROUPS = 16
"""Query heads per key-value head, at most."""


def check(q: Tensor, sinks: Tensor | None, selection: Selection, options: Options) -> None:
    """Refuse what the kernels cannot compute.

    Raises:
        ValueError: device, dtype, head_dim, block, group size or scale; the message says what to
            pass instead.
    """
    check_tensors(q, len(selection.columns), selection.block)
    if options.scale < 0:
        raise ValueError(f"scale must not be negative on the triton backend, got {options.scale}")


def check_tensors(q: Tensor, kv_heads: int, block: int) -> None:
    """The part of `check` that the selection needs as well."""
    alternative = "pass backend='reference' (quadratic memory)"
    if q.device.type == "cpu":
        if not interpreting():
            raise ValueError(
                "backend 'triton' takes CUDA tensors, got CPU ones: pass backend='cpu' (or set "
                "TRITON_INTERPRET=1 before Python starts, to run the kernels in Triton's slow "
                "interpreter)"
            )
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    else:
        dtypes = (torch.bfloat16, torch.float16)
        major, minor = torch.cuda.get_device_capability(q.device)
        if major < 8:
            raise ValueError(
                f"the triton backend needs a GPU of compute capability 8.0 or higher, "
                f"{torch.cuda.get_device_name(q.device)} has {major}.{minor}; {alternative}"
            )
    if q.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        where = "CUDA" if q.device.type == "cuda" else "the interpreter"
        raise ValueError(
            f"the triton backend computes in {names} on {where}, got {q.dtype}: cast q, k and v "
            f"(training: precision bf16-mixed or bf16-true), or {alternative}"
        )
    least, most = DIMS
    if not least <= q.shape[2] <= most or q.shape[2] % 16:
        raise ValueError(
            f"the triton backend takes a head_dim that is a multiple of 16 from {least} to {most}, "
            f"got {q.shape[2]}; {alternative}"
        )
    if block < LEAST_BLOCK:
        raise ValueError(
            f"the triton backend takes blocks of {LEAST_BLOCK} keys or more, got block={block}"
        )
    if q.shape[1] > MOST_GROUPS * kv_heads:
        raise ValueError(
            f"the triton backend takes up to {MOST_GROUPS} query heads per key-value head, got "
            f"{q.shape[1] // kv_heads}; {alternative}"
        )


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(knobs.runtime.interpret)


@dataclass(frozen=True)
class _Problem:
    """What all launches of one call share."""

    heads: int
    dim: int
    rows: Rows
    selection: Selection
    columns: Tensor
    entry: Tensor
    tables: Tables
    options: Options

    @classmethod
    def of(cls, q: Tensor, k: Tensor, selection: Selection, options: Options) -> _Problem:
        heads = k.shape[1]
        return cls(
            heads=heads,
            dim=q.shape[2],
            rows=Rows.of(q.shape[1] // heads, selection.tile),
            selection=selection,
            columns=selection.columns.contiguous(),
            entry=selection.entry.contiguous(),
            tables=tables(selection.plan, q.device),
            options=options,
        )

    @property
    def logits(self) -> tuple[float, float, float, int]:
        """scale_log2, cap_in, cap_out, window: the runtime arguments of the logits."""
        scale, softcap, log2e = self.options.scale, self.options.softcap, math.log2(math.e)
        cap_in = 0.0 if softcap is None else 2 * log2e * scale / softcap
        cap_out = 0.0 if softcap is None else softcap * log2e
        return scale * log2e, cap_in, cap_out, self.options.window or 0

    @property
    def shape(self) -> dict[str, Any]:
        """The compile-time constants that all attention kernels share."""
        return {
            "G": self.rows.groups,
            "GP": self.rows.padded_groups,
            "D": self.dim,
            "DP": padded_dim(self.dim),
            "TILE": self.selection.tile,
            "BLOCK": self.selection.block,
            "WINDOW": self.options.window is not None,
            "SOFTCAP": self.options.softcap is not None,
        }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    selection: Selection,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, D] and lse [T, Hq] float32; see `sparse_attention` for the arguments."""
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    problem = _Problem.of(q, k, selection, options)
    config = launch("forward", q.device, problem.dim)
    size, step = problem.rows.count(config.rows), min(config.step, selection.block)
    tma = config.tma and describable(k, v)
    run(
        forward_kernel, (selection.plan.tiles * problem.rows.chunks(size), problem.heads),
        q, *(_keys(x, step, tma) for x in (k, v)), out, lse, sinks,
        problem.columns, problem.entry, problem.tables.tiles, problem.columns.shape[1],
        *problem.logits, *_strides(q, k, v, out), lse.stride(0),
        TILE_FIELDS=TILE_FIELDS, ROWS=size, STEP=step, SINK=sinks is not None, TMA=tma,
        **problem.shape, num_warps=config.warps_for(size), num_stages=config.stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    selection: Selection,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the sinks, bit for bit the same in every run."""
    q, k, v, grad_out = rowwise(q), rowwise(k), rowwise(v), rowwise(grad_out)
    problem = _Problem.of(q, k, selection, options)
    shape, rows, heads = problem.shape, problem.rows, problem.heads
    tokens = q.shape[0]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not tokens:
        return dq, dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)

    statistics = (heads, tokens, rows.groups)
    lse2 = torch.empty(statistics, dtype=torch.float32, device=q.device)
    delta = torch.empty(statistics, dtype=torch.float32, device=q.device)
    run(
        statistics_kernel, (-(-tokens * q.shape[1] // 64),),
        out, grad_out, lse, lse2, delta, tokens, *_strides(out, grad_out),
        G=rows.groups, HEADS=q.shape[1], D=problem.dim, DP=shape["DP"], ROWS=64,
    )  # fmt: skip

    config = launch("dq", q.device, problem.dim)
    size, step = rows.count(config.rows), min(config.step, selection.block)
    tma = config.tma and describable(k, v)
    slots = problem.columns.shape[1]
    run(
        dq_kernel, (selection.plan.tiles * rows.chunks(size), heads),
        q, *(_keys(x, step, tma) for x in (k, v)), grad_out, lse2, delta, dq,
        problem.columns, problem.entry, problem.tables.tiles, slots, tokens,
        options.scale, *problem.logits, *_strides(q, k, v, grad_out, dq),
        TILE_FIELDS=TILE_FIELDS, ROWS=size, STEP=step, TMA=tma,
        **shape, num_warps=config.warps_for(size), num_stages=config.stages,
    )  # fmt: skip
    _keys_backward(problem, make_work(selection), q, k, v, grad_out, lse2, delta, dk, dv)

    d_sinks = None
    if sinks is not None:
        # The sink's weight times -delta, summed over rows.
        weight = torch.exp(sinks.float() - lse)
        by_row = delta.permute(1, 0, 2).reshape(tokens, -1)
        d_sinks = -(weight * by_row).sum(0).to(sinks.dtype)
    return dq, dk, dv, d_sinks


def _keys_backward(
    problem: _Problem,
    work: Work,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fill dk and dv."""
    block, shape, rows = problem.selection.block, problem.shape, problem.rows
    config = launch("dkdv", q.device, problem.dim)
    keys = min(config.step, block)
    size = rows.count(config.rows)
    tma = config.tma and describable(q, grad_out)
    box = [size // rows.padded_groups, rows.padded_groups, shape["DP"]]
    operands = [_describe(x, box) for x in (q, grad_out)] if tma else [q, grad_out]
    partial = torch.empty(
        work.partials, 2, block, shape["DP"], dtype=torch.float32, device=q.device
    )
    for want_dk, want_dv in ((True, False), (False, True)) if config.split else ((True, True),):
        run(
            dkdv_kernel, (len(work.items), block // keys),
            operands[0], k, v, operands[1], lse2, delta, dk, dv, partial,
            work.lists, work.entries, work.items, problem.tables.blocks,
            work.lists.shape[1], q.shape[0], problem.options.scale, *problem.logits,
            *_strides(q, k, v, grad_out, dk, dv),
            BLOCK_FIELDS=BLOCK_FIELDS, ITEM_FIELDS=ITEM_FIELDS, KEYS=keys, ROWS=size,
            WANT_DK=want_dk, WANT_DV=want_dv, TMA=tma,
            **shape, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    blocks = len(problem.tables.blocks)
    if work.partials:
        run(
            reduce_kernel, (blocks, problem.heads, block // LEAST_BLOCK),
            partial, work.columns, dk, dv, problem.tables.blocks, blocks, *_strides(dk, dv),
            BLOCK_FIELDS=BLOCK_FIELDS, D=problem.dim, DP=shape["DP"], BLOCK=block,
            KEYS=LEAST_BLOCK,
        )  # fmt: skip


def rowwise(x: Tensor) -> Tensor:
    """x as kernels read it: last dimension contiguous, offsets within a tile below 2^31.

    A copy only where it is not so.
    """
    far = max(x.stride(0) * 256, x.stride(1) * MOST_GROUPS) >= 2**31
    return x.contiguous() if x.stride(-1) != 1 or far else x


def describable(*tensors: Tensor) -> bool:
    """Whether the TMA can address these tensors: 16-byte aligned, in address and strides."""
    return all(
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in tensors
    )


def _keys(x: Tensor, step: int, tma: bool) -> Tensor | TensorDescriptor:
    return _describe(x, [step, 1, padded_dim(x.shape[2])]) if tma else x


def _describe(x: Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
