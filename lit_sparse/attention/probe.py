"""Exact attention statistics of sampled rows: what a kept set captures, how sharp heads are.

A sampled row is compared with its whole causal context, so the cost is rows x context and nothing
of size n^2 ever exists. Formulas: for a kept set S of a row with softmax p, captured mass 1 - tau =
sum of p over S; tau is also the total-variation distance to the renormalised restriction, and
KL(p_S || p) = -ln(1 - tau). See "How Sparse Attention Approximates Exact Attention?" (arXiv
2404.02690) for what it claims of k(n) = alpha * n^C; the quantities here are measured, not bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lit_sparse.attention.plan import Plan
from lit_sparse.attention.selection import Selection

SINK_TOKENS = 4
"""Keys at a document's start that "without sink" leaves out, renormalising the rest."""

_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of R sampled rows, float32 [R, Hq] but for the first two.

    "Dense" means the softmax over all causal keys of the row's document.
    """

    rows: Tensor
    """int64 [R]: packed rows."""
    context: Tensor
    """int64 [R]: keys that each row sees, itself included (n)."""
    captured_mass: Tensor
    """Dense softmax mass of the kept keys, 1 - tau."""
    output_error: Tensor
    """||o_dense - o_sparse|| / ||o_dense||."""
    entropy: Tensor
    """Of the dense softmax, in nats."""
    entropy_ratio: Tensor
    """entropy / ln(n), in [0, 1]; 1 where n is 1."""
    effective_support: Tensor
    """exp(entropy): the number of equally weighted keys of the same entropy."""
    max_weight: Tensor
    max_weight_without_sink: Tensor
    """The same without the first SINK_TOKENS keys, renormalised; 0 for rows that see no other."""
    sink_mass: Tensor
    """Dense mass of the first SINK_TOKENS keys."""
    logit_std: Tensor
    """Standard deviation of the row's logits (sigma)."""
    logit_max: Tensor
    """Largest absolute logit."""

    @property
    def gamma(self) -> Tensor:
        """sigma^2 / (2 ln n) [R, Hq]: collapse of Gaussian logits at 1 (random-energy model)."""
        return self.logit_std**2 / (2 * self.context.clamp(min=2).log()[:, None])


def sample_rows(
    plan: Plan, count: int, generator: torch.Generator | None = None, min_context: int = 1
) -> Tensor:
    """`count` packed rows (fewer if there are not as many) that see at least `min_context` keys.

    Drawn evenly without repetition, ascending; int64 on the host.
    """
    eligible = [
        torch.arange(begin + max(min_context - 1 - context, 0), end)
        for begin, end, context in zip(
            plan.queries, plan.queries[1:], plan.context.tolist(), strict=False
        )
        if end - begin + context >= min_context
    ]
    rows = torch.cat(eligible) if eligible else torch.empty(0, dtype=torch.int64)
    chosen = torch.randperm(len(rows), generator=generator)[:count]
    return rows[chosen].sort().values


@torch.no_grad()
def probe_rows(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, rows: Tensor, scale: float | None = None
) -> RowStatistics:
    """Exact statistics of packed `rows`, in float32 (float64 for float64 inputs).

    Args:
        q: [T, Hq, D]; k, v: [Tk, Hkv, D]; the tensors that `selection` was made from.
        rows: int64 [R], for example from `sample_rows`.
        scale: softmax scale; None: D ** -0.5.
    """
    plan = selection.plan
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = rows.to(q.device)
    begins = torch.tensor(plan.queries, device=q.device)
    document = torch.bucketize(rows, begins[:-1], right=True) - 1
    # bucketize puts a row after the last document that starts at or before it: never an empty one,
    # since the next document starts at the same row.
    key_begin = torch.tensor(plan.keys, device=q.device)
    cached = torch.from_numpy(plan.context).to(q.device)
    context = rows - begins[document] + cached[document] + 1

    names = [f.name for f in fields(RowStatistics)][2:]
    result = {name: q.new_empty(len(rows), q.shape[1], dtype=_dtype(q)) for name in names}
    for d in document.unique().tolist():
        begin, end = int(key_begin[d]), int(key_begin[d + 1])
        step = max(_CHUNK_BYTES // (4 * q.shape[1] * (end - begin)), 1)
        for part in (document == d).nonzero()[:, 0].split(step):
            seen = int(context[part].max())
            keys, values = k[begin : begin + seen], v[begin : begin + seen]
            kept = selection.rows_mask(rows[part], seen)
            columns = _statistics(q[rows[part]], keys, values, context[part], kept, scale)
            for name, column in zip(names, columns, strict=True):
                result[name][part] = column
    return RowStatistics(rows, context, **result)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _statistics(
    q: Tensor, k: Tensor, v: Tensor, context: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """q [R, Hq, D]; k, v [N, Hkv, D]; context [R]; kept bool [Hkv, R, N]. Fields from
    captured_mass on.
    """
    dtype = _dtype(q)
    groups = q.shape[1] // k.shape[1]
    key = torch.arange(len(k), device=q.device)
    hidden = key >= context[:, None]

    def by_head(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(0, 1).repeat_interleave(groups, 0)

    # [Hq, R, N] from here on.
    logits = scale * (q.to(dtype).transpose(0, 1) @ by_head(k).transpose(1, 2))
    count = context[None, :, None]
    mean = logits.masked_fill(hidden, 0.0).sum(-1, keepdim=True) / count
    variance = (logits - mean).masked_fill(hidden, 0.0).square().sum(-1) / context
    largest = logits.masked_fill(hidden, 0.0).abs().amax(-1)
    log_p = logits.masked_fill(hidden, float("-inf")).log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(hidden, 0.0)).sum(-1)

    kept = kept.repeat_interleave(groups, 0)
    p_kept = p.masked_fill(~kept, 0.0)
    captured = p_kept.sum(-1)
    values = by_head(v)
    dense = p @ values
    sparse = (p_kept / captured.clamp(min=torch.finfo(dtype).tiny)[..., None]) @ values
    error = (dense - sparse).norm(dim=-1) / dense.norm(dim=-1).clamp(min=torch.finfo(dtype).tiny)

    sink = p[..., :SINK_TOKENS].sum(-1)
    # Summed, not 1 - sink: where the sink takes nearly all, that difference is rounding.
    rest = p[..., SINK_TOKENS:]
    if rest.shape[-1]:
        without = rest.amax(-1) / rest.sum(-1).clamp(min=torch.finfo(dtype).tiny)
    else:
        without = torch.zeros_like(sink)
    log_n = context.to(dtype).log()
    ratio = torch.where(context > 1, entropy / log_n.clamp(min=math.log(2)), 1.0)
    result = (
        captured.clamp(max=1.0),
        error,
        entropy,
        ratio,
        entropy.exp(),
        p.amax(-1),
        without,
        sink,
        variance.sqrt(),
        largest,
    )
    return tuple(x.T for x in result)
