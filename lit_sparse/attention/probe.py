"""Exact attention statistics of sampled rows: what a kept set loses, how sharp heads are.

A sampled row is compared with its whole causal context, so the cost is rows x context and nothing
of size n^2 ever exists. Formulas: for a kept set S of a row with softmax p, captured mass 1 - tau =
sum of p over S = exp(lse_S - lse); tau is also the total-variation distance to the renormalised
restriction p_S, and KL(p_S || p) = -ln(1 - tau) = lse - lse_S. See "How Sparse Attention
Approximates Exact Attention?" (arXiv 2404.02690) for what it claims of k(n) = alpha * n^C; the
quantities here are measured, not bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Statistics of R sampled rows, float32 [R, H] but for `context`; H query heads.

    "Dense" means the softmax over all causal keys of the row's document.
    """

    context: Tensor
    """int64 [R]: keys that each row sees, itself included (n)."""
    kl: Tensor
    """KL(p_S || p) = lse - lse_S in nats, of the kept keys S; 0 where nothing is dropped."""
    output_error: Tensor
    """||o_dense - o_sparse|| / ||o_dense||."""
    recall: Tensor
    """Mass of the far blocks that the row sees, over that of equally many best ones (the oracle of
    this row and head). Far is what is not always kept. NaN where nothing was chosen.
    """
    entropy: Tensor
    """Of the dense softmax, in nats."""
    entropy_without_sink: Tensor
    """The same without the first SINK_TOKENS keys, renormalised; 0 for rows that see no other."""
    max_weight: Tensor
    max_weight_without_sink: Tensor
    collision: Tensor
    """Sum of squared weights: its inverse is the participation ratio, 1 - it the trace of the
    softmax's Jacobian."""
    collision_without_sink: Tensor
    sink_mass: Tensor
    """Dense mass of the first SINK_TOKENS keys."""
    logit_std: Tensor
    """Standard deviation of the row's logits (sigma)."""
    logit_max: Tensor
    """Largest absolute logit."""
    logit_range: Tensor
    """Largest - smallest logit."""

    @property
    def tau(self) -> Tensor:
        """Dense softmax mass of the dropped keys, in [0, 1]."""
        return -torch.expm1(-self.kl)

    @property
    def captured_mass(self) -> Tensor:
        """Dense softmax mass of the kept keys, 1 - tau."""
        return torch.exp(-self.kl)

    @property
    def entropy_ratio(self) -> Tensor:
        """entropy / ln(n), in [0, 1]; 1 where n is 1."""
        return self._ratio(self.entropy, self.context)

    @property
    def entropy_ratio_without_sink(self) -> Tensor:
        return self._ratio(self.entropy_without_sink, self.context - SINK_TOKENS)

    @property
    def effective_support(self) -> Tensor:
        """exp(entropy): the number of equally weighted keys of the same entropy."""
        return self.entropy.exp()

    @property
    def participation(self) -> Tensor:
        """1 / sum p^2, in keys."""
        return 1 / self.collision

    @property
    def jacobian_trace(self) -> Tensor:
        """1 - sum p^2: 0 where the softmax passes no gradient."""
        return 1 - self.collision

    @property
    def gamma(self) -> Tensor:
        """sigma^2 / (2 ln n): collapse of Gaussian logits at 1 (random-energy model)."""
        return self.logit_std**2 / (2 * self.context.clamp(min=2).log()[:, None])

    @property
    def gamma_of_entropy(self) -> Tensor:
        """1 - H / ln n: what gamma would be, were the logits Gaussian."""
        return 1 - self.entropy_ratio

    @staticmethod
    def _ratio(entropy: Tensor, keys: Tensor) -> Tensor:
        log_n = keys.clamp(min=2).to(entropy.dtype).log()[:, None]
        return torch.where(keys[:, None] > 1, entropy / log_n, 1.0)


STATISTICS = tuple(f.name for f in fields(RowStatistics))[1:]
"""Names of the [R, H] fields of `RowStatistics`."""


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
    scale: float | None = None,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    heads: Sequence[int] | None = None,
) -> RowStatistics:
    """Exact statistics of packed `rows`, in float32 (float64 for float64 inputs).

    Args:
        q: [T, Hq, D]; k, v: [Tk, Hkv, D]; the tensors that `selection` was made from.
        rows: int64 [R], for example from `sample_rows`.
        scale: softmax scale; None: D ** -0.5.
        out, lse: what `sparse_attention` gave, [T, Hq, D] and [T, Hq]; then the gap is that of the
            operator that ran, rounding included. None: the definition's, computed here.
        heads: query heads to look at, H of them; None: all.
    """
    plan, device = selection.plan, q.device
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    head = torch.arange(q.shape[1]) if heads is None else torch.tensor(heads)
    kv_head = (head // (q.shape[1] // k.shape[1])).to(device)
    head = head.to(device)
    # Rows, documents and contexts are host arithmetic: a device is not waited for.
    rows = rows.cpu()
    begins = torch.tensor(plan.queries)
    # Never an empty document: the next one starts at the same row.
    document = torch.bucketize(rows, begins[:-1], right=True) - 1
    context = rows - begins[document] + torch.from_numpy(plan.context)[document] + 1
    tile, _ = selection.row_places(rows)
    sink = torch.from_numpy(plan.counts[:, 0])[tile]
    local = torch.from_numpy(plan.first_local)[tile]

    result = {name: q.new_empty(len(rows), len(head), dtype=_dtype(q)) for name in STATISTICS}
    for d in document.unique().tolist():
        begin, end = plan.keys[d], plan.keys[d + 1]
        step = max(_CHUNK_BYTES // (4 * len(head) * (end - begin)), 1)
        for part in (document == d).nonzero()[:, 0].split(step):
            seen, where = int(context[part].max()), part.to(device)
            own = rows[part].to(device)
            keys = _by_head(k[begin : begin + seen], kv_head)
            values = _by_head(v[begin : begin + seen], kv_head)
            logits = scale * (_by_head(q[own], head) @ keys.transpose(1, 2))
            hidden = torch.arange(seen, device=device) >= context[part].to(device)[:, None]
            found, p, dense_lse = _sharpness(logits, hidden, context[part].to(device))

            kept = selection.rows_blocks(rows[part])[kv_head, :, : -(-seen // plan.block)]
            far = (sink[part].to(device), local[part].to(device))
            found["recall"] = _recall(p, kept, *far, plan.block)
            if out is None or lse is None:
                mask = kept.repeat_interleave(plan.block, -1)[..., :seen]
                logits.masked_fill_(~mask | hidden, -math.inf)
                sparse_lse = logits.logsumexp(-1)
                sparse = (logits - sparse_lse[..., None]).exp() @ values
            else:
                sparse_lse = lse[own][:, head].T.to(logits.dtype)
                sparse = _by_head(out[own], head)
            found["kl"] = (dense_lse - sparse_lse).clamp(min=0)
            dense = p @ values
            tiny = torch.finfo(dense.dtype).tiny
            error = (dense - sparse).norm(dim=-1) / dense.norm(dim=-1).clamp(min=tiny)
            found["output_error"] = error
            for name, value in found.items():
                result[name][where] = value.T
    return RowStatistics(context, **result)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_head(x: Tensor, heads: Tensor) -> Tensor:
    """[N, heads of x, D] as [H, N, D], in the dtype that statistics have."""
    return x.index_select(1, heads).to(_dtype(x)).transpose(0, 1)


def _sharpness(
    logits: Tensor, hidden: Tensor, context: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """logits [H, R, N], hidden bool [R, N], context [R]: the statistics of the dense softmax,
    [H, R] each, the softmax itself, and its log-sum-exp.
    """
    seen = logits.masked_fill(hidden, 0.0)
    mean = seen.sum(-1, keepdim=True) / context[:, None]
    variance = (seen - mean).masked_fill_(hidden, 0.0).square_().sum(-1) / context
    smallest = logits.masked_fill(hidden, math.inf).amin(-1)
    largest = logits.masked_fill(hidden, -math.inf).amax(-1)

    seen -= largest[..., None]
    weights = seen.exp().masked_fill_(hidden, 0.0)
    total = weights.sum(-1)
    p = weights.div_(total[..., None])
    plain = _entropy_and_collision(p, seen, torch.zeros_like(total), total.log())

    sink = p[..., :SINK_TOKENS].sum(-1)
    # Summed, not 1 - sink: where the sink takes nearly all, that difference is rounding.
    rest = p[..., SINK_TOKENS:]
    tiny = torch.finfo(p.dtype).tiny
    if rest.shape[-1]:
        left = rest.sum(-1).clamp(min=tiny)
        without = _entropy_and_collision(rest, seen[..., SINK_TOKENS:], left.log(), total.log())
        heaviest = rest.amax(-1) / left
    else:
        without, heaviest = (torch.zeros_like(sink),) * 2, torch.zeros_like(sink)
    names = ("max_weight", "max_weight_without_sink", "sink_mass", "logit_std")
    values = (1 / total, heaviest, sink, variance.sqrt())
    found = dict(zip(names, values, strict=True))
    found["entropy"], found["collision"] = plain
    found["entropy_without_sink"], found["collision_without_sink"] = without
    found["logit_max"] = torch.maximum(largest.abs(), smallest.abs())
    found["logit_range"] = largest - smallest
    return found, p, total.log() + largest


def _entropy_and_collision(
    p: Tensor, logits: Tensor, log_mass: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor]:
    """Of p / exp(log_mass), where p = exp(logits - log_total) [H, R, N]; [H, R] each."""
    mass = log_mass.exp()
    mean = torch.linalg.vecdot(p, logits) / mass
    entropy = (log_total + log_mass - mean).clamp(min=0)
    return entropy, torch.linalg.vecdot(p, p) / mass.square()


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
