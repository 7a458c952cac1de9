"""Exact attention statistics of sampled rows: what a kept set loses, how sharp heads are.

A sampled row is compared with its whole causal context, so the cost is rows x context and nothing
of size n^2 ever exists. Formulas: for a kept set S of a row with softmax p, captured mass 1 - tau =
sum of p over S = exp(lse_S - lse); tau is also the total-variation distance to the renormalised
restriction p_S, and KL(p_S || p) = -ln(1 - tau) = lse - lse_S. See "How Sparse Attention
Approximates Exact Attention?" (arXiv 2404.02690) for what it claims of k(n) = alpha * n^C; the
quantities here are measured, not bounded. A learned sink (`Options.sinks`) is one more key, which
is always kept and has no value: with it in both log-sum-exps the formulas hold as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import Plan
from lit_sparse.attention.row_statistics import SINK_TOKENS, STATISTICS, RowStatistics
from lit_sparse.attention.selection import Selection

_CHUNK_BYTES = (2 * 2**20, 32 * 2**20)
"""Of one temporary tensor: what stays in a CPU's cache; what keeps a GPU busy."""


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    rows: Tensor,
    options: Options | None = None,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    heads: Sequence[int] | None = None,
) -> RowStatistics:
    """Exact statistics of packed `rows`, in float32 (float64 for float64 inputs).

    Args:
        q: [T, Hq, D]; k, v: [Tk, Hkv, D]; the tensors that `selection` was made from.
        rows: int64 [R], for example from `sample_rows`.
        options: of the softmax, as observers get them; None: scale D ** -0.5.
        out, lse: what `sparse_attention` gave, [T, Hq, D] and [T, Hq]; then the gap is that of the
            operator that ran, rounding included. None: the definition's, computed here.
        heads: query heads to look at, H of them; None: all.

    Raises:
        ValueError: of a layer with a window, which is all that it has of dense attention.
    """
    plan, device = selection.plan, q.device
    options = Options(q.shape[-1] ** -0.5) if options is None else options
    options.refuse_window()
    group = q.shape[1] // k.shape[1]
    asked = torch.arange(q.shape[1]) if heads is None else torch.tensor(heads)
    # Whole groups: the query heads of a key-value head read the same keys.
    kv_heads = (asked // group).unique()
    # Rows, documents and contexts are host arithmetic: a device is not waited for.
    rows = rows.cpu()
    begins = torch.tensor(plan.queries)
    # Never an empty document: the next one starts at the same row.
    document = torch.bucketize(rows, begins[:-1], right=True) - 1
    context = rows - begins[document] + torch.from_numpy(plan.context)[document] + 1
    kept = selection.rows_blocks(rows)
    tile, _ = selection.row_places(rows)
    sink = torch.from_numpy(plan.counts[:, 0])[tile].to(device)
    local = torch.from_numpy(plan.first_local)[tile].to(device)

    size = (len(rows), q.shape[1])
    result = {name: q.new_empty(size, dtype=_dtype(q)) for name in STATISTICS}
    chunk = _CHUNK_BYTES[device.type == "cuda"] // 4
    for d in document.unique().tolist():
        own = (document == d).nonzero()[:, 0]
        begin, longest = plan.keys[d], int(context[own].max())
        for some in kv_heads.split(max(chunk // (longest * q.shape[-1]), 1)):
            head = (some[:, None] * group + torch.arange(group)).flatten().to(device)
            some = some.to(device)
            keys = _by_head(k[begin : begin + longest], some)
            values = _by_head(v[begin : begin + longest], some)
            for part in own.split(max(chunk // (longest * len(head)), 1)):
                # Rows come in order, so the first ones see few keys.
                seen, where = int(context[part].max()), part.to(device)
                row = rows[part].to(device)
                queries = _by_head(q[row], head).unflatten(0, (-1, group)).flatten(1, 2)
                logits = (options.scale * queries) @ keys[:, :seen].transpose(1, 2)
                logits = options.cap(logits)
                logits = logits.unflatten(1, (group, -1)).flatten(0, 1)
                n = context[part].to(device)
                hidden = torch.arange(seen, device=device) >= n[:, None]
                found, p, log_total, largest = _sharpness(logits, hidden, n)
                learned = None if options.sinks is None else options.sinks[head, None] - largest
                share, log_total = _with_sink(log_total, learned)
                found["sink_mass"] = 1 - share * (1 - found["sink_mass"])

                blocks = kept[some][:, where, : -(-seen // plan.block)]
                blocks = blocks.repeat_interleave(group, 0)
                found["recall"] = _recall(p, blocks, sink[where], local[where], plan.block)
                if out is None or lse is None:
                    mask = blocks.repeat_interleave(plan.block, -1)[..., :seen]
                    logits -= largest[..., None]
                    logits.masked_fill_(~mask | hidden, -math.inf)
                    kept_share, log_kept = _with_sink(logits.logsumexp(-1), learned)
                    kl = log_total - log_kept
                    sparse = _times(logits.softmax(-1), values) * kept_share[..., None]
                else:
                    kl = log_total + largest - lse[row][:, head].T.to(logits.dtype)
                    sparse = _by_head(out[row], head)
                found["kl"] = kl.clamp(min=0)
                dense = _times(p, values) * share[..., None]
                tiny = torch.finfo(dense.dtype).tiny
                error = (dense - sparse).norm(dim=-1) / dense.norm(dim=-1).clamp(min=tiny)
                found["output_error"] = error
                for name, value in found.items():
                    result[name][where[:, None], head] = value.T
    columns = asked.to(device)
    return RowStatistics(context, **{name: x[:, columns] for name, x in result.items()})


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_head(x: Tensor, heads: Tensor) -> Tensor:
    """[N, heads of x, D] as [H, N, D], in the dtype that statistics have."""
    return x.index_select(1, heads).to(_dtype(x)).transpose(0, 1)


def _times(p: Tensor, values: Tensor) -> Tensor:
    """Weights [H, R, n] of the values [Hkv, N, D], of which a row sees the first n: [H, R, D]."""
    grouped = p.unflatten(0, (len(values), -1)).flatten(1, 2) @ values[:, : p.shape[-1]]
    return grouped.unflatten(1, (-1, p.shape[1])).flatten(0, 1)


def _with_sink(log_total: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The keys' share of the softmax, and its log-sum-exp, where a sink joins that of the keys."""
    if sink is None:
        return torch.ones_like(log_total), log_total
    both = torch.logaddexp(log_total, sink.to(log_total.dtype))
    return (log_total - both).exp(), both


def _sharpness(
    logits: Tensor, hidden: Tensor, context: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """logits [H, R, N], hidden bool [R, N], context [R]: the statistics of the dense softmax,
    [H, R] each, the softmax itself, and its log-sum-exp in two parts, the largest logit apart.
    """
    seen = logits.masked_fill(hidden, 0.0)
    mean = seen.sum(-1, keepdim=True) / context[:, None]
    variance = (seen - mean).masked_fill_(hidden, 0.0).square_().sum(-1) / context
    smallest = logits.masked_fill(hidden, math.inf).amin(-1)
    found, p, log_total, largest = _softmax(logits, hidden)
    # A softmax of its own: where the sink takes nearly all, what p leaves to the rest underflows.
    rest, *_ = _softmax(logits[..., SINK_TOKENS:], hidden[:, SINK_TOKENS:])
    found |= {f"{name}_without_sink": value for name, value in rest.items()}
    found["sink_mass"] = p[..., :SINK_TOKENS].sum(-1)
    found["logit_std"] = variance.sqrt()
    found["logit_max"] = torch.maximum(largest.abs(), smallest.abs())
    found["logit_range"] = largest - smallest
    return found, p, log_total, largest


def _softmax(logits: Tensor, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Entropy, collision and largest weight of a softmax [H, R, N], all 0 where everything is
    hidden; the softmax, and the log-sum-exp, of the logits less the largest, and that.
    """
    if not logits.shape[-1]:
        nothing = logits.new_zeros(logits.shape[:2])
        found = dict.fromkeys(("entropy", "collision", "max_weight"), nothing)
        return found, logits, nothing, nothing
    largest = logits.masked_fill(hidden, -math.inf).amax(-1)
    relative = (logits - largest[..., None]).masked_fill_(hidden, 0.0)
    weights = relative.exp().masked_fill_(hidden, 0.0)
    total = weights.sum(-1)
    some, total = total > 0, total.clamp(min=1)  # the largest alone gives 1
    p = weights.div_(total[..., None])
    entropy = (total.log() - torch.linalg.vecdot(p, relative)).clamp(min=0)
    found = {"entropy": entropy, "collision": torch.linalg.vecdot(p, p), "max_weight": some / total}
    return found, p, total.log(), largest


def _recall(p: Tensor, kept: Tensor, sink: Tensor, local: Tensor, block: int) -> Tensor:
    """p [H, R, N], kept bool [H, R, blocks]; sink and local [R]: blocks before the candidates, and
    the first behind them. [H, R]
    """
    mass = torch.nn.functional.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)
    number = torch.arange(mass.shape[-1], device=p.device)
    far = (number >= sink[:, None]) & (number < local[:, None])
    chosen = kept & far
    best = mass.masked_fill(~far, 0.0).sort(-1, descending=True).values.cumsum(-1)
    count = chosen.sum(-1)
    oracle = best.gather(-1, (count - 1).clamp(min=0)[..., None])[..., 0]
    recall = mass.masked_fill(~chosen, 0.0).sum(-1) / oracle.clamp(min=torch.finfo(p.dtype).tiny)
    return torch.where(count > 0, recall, math.nan)
