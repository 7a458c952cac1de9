"""How many keys a row needs: the least that any choice of keys, or of blocks, can do.

What is always kept (sink tokens, local window) is taken out and the rest renormalised: a sink that
has nearly all the mass would otherwise hide how many keys the rest of it is spread over. The choice
is an oracle's, which knows the weights; a selection that has to guess needs more. A sampled row is
compared with its own context, so nothing of size n^2 exists. A learned sink (gpt-oss) is always
kept as well: it changes no number here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lit_sparse.attention.options import Options
from lit_sparse.attention.select import boundaries, check_shapes

_CHUNK_BYTES = 32 * 2**20

# The least weights are summed in another order than their total: equal weights that miss exactly
# the allowed mass must not depend on the rounding of either.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class RowNeed:
    """Needs of R sampled rows, float32 [R, H] (float64 for float64 inputs) but for `context`.

    H query heads. The rest of a row is the keys that are not always kept; rows that have none need
    their whole context, and the statistics of their rest are 0.
    """

    context: Tensor
    """int64 [R]: keys that each row sees, itself included (n)."""
    keys: Tensor
    """Those always kept and the fewest others that have the share 1 - missed of the rest's mass."""
    block_keys: Tensor
    """The same where blocks are kept whole, in keys: the blocks that hold a key of those always
    kept, and the fewest others that have that share of the mass of the others. Never fewer than
    `keys`.
    """
    support: Tensor
    """exp(entropy) of the rest: the number of equally weighted keys of the same entropy."""
    logit_range: Tensor
    """Largest - smallest logit of the rest, in nats."""
    logit_std: Tensor
    """Standard deviation of the rest's logits, in nats."""


NEEDS = tuple(f.name for f in fields(RowNeed))[1:]
"""Names of the [R, H] fields of `RowNeed`."""


@torch.no_grad()
def rows_need(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    *,
    missed: float = 0.05,
    block: int = 64,
    sink: int = 64,
    local: int = 64,
    options: Options | None = None,
) -> RowNeed:
    """How many keys packed `rows` need under dense causal attention.

    Args:
        q: [T, Hq, D]; k: [T, Hkv, D], packed; Hkv divides Hq.
        rows: int64 [R], rows of the packed tensors; for example from `probe.sample_rows`.
        cu_seqlens: [documents + 1], boundaries of the documents; None: one document.
        missed: share of the rest's mass that may be missed, strictly between 0 and 1.
        block: keys of a block; the grid starts at each document's start.
        sink: tokens at a document's start that are always kept.
        local: nearest tokens that are always kept, the row's own included; 0 for none.
        options: of the softmax, as observers get them; None: scale D ** -0.5.

    Raises:
        ValueError: an argument does not fit, or the layer has a window; the message names it.
    """
    check_shapes(q, k)
    bounds = torch.tensor(boundaries("cu_seqlens", cu_seqlens, q.shape[0]))
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens and k {k.shape[0]}: they must have as many")
    if not 0 < missed < 1:
        raise ValueError(f"missed must lie strictly between 0 and 1, got {missed!r}")
    if block < 1 or sink < 0 or local < 0:
        raise ValueError(
            f"block must be at least 1, sink and local at least 0, got {block}, {sink}, {local}"
        )
    rows = rows.cpu()
    if rows.dim() != 1 or bool(((rows < 0) | (rows >= q.shape[0])).any()):
        raise ValueError(f"rows must be int64 [R] within the {q.shape[0]} tokens, got {rows}")
    options = Options(q.shape[-1] ** -0.5) if options is None else options
    options.refuse_window()

    document = torch.bucketize(rows, bounds[:-1], right=True) - 1
    context = rows - bounds[document] + 1
    dtype = torch.promote_types(q.dtype, torch.float32)
    found = {name: q.new_zeros(len(rows), q.shape[1], dtype=dtype) for name in NEEDS}
    for d in document.unique().tolist():
        begin, end = int(bounds[d]), int(bounds[d + 1])
        keys = k[begin:end].to(dtype).permute(1, 2, 0)
        step = max(_CHUNK_BYTES // (4 * q.shape[1] * (end - begin)), 1)
        for part in (document == d).nonzero()[:, 0].split(step):
            seen, where = int(context[part].max()), part.to(q.device)
            # The heads that share keys are rows of one product: keys are not repeated.
            queries = q[rows[part].to(q.device)].to(dtype).unflatten(1, (k.shape[1], -1))
            products = queries.permute(1, 2, 0, 3).flatten(1, 2) @ keys[..., :seen]
            logits = options.cap(products.mul_(options.scale)).view(q.shape[1], len(part), seen)
            n = context[part].to(q.device)
            for name, value in _needs(logits, n, missed, block, sink, local).items():
                found[name][where] = value.T.to(dtype)
    return RowNeed(context, **found)


def _needs(
    logits: Tensor, context: Tensor, missed: float, block: int, sink: int, local: int
) -> dict[str, Tensor]:
    """logits [H, R, N], context [R]: the fields of `RowNeed`, [H, R] each."""
    n = context[:, None]
    position = torch.arange(logits.shape[-1], device=logits.device)
    rest = (position >= sink) & (position < n - local)
    logits = logits.masked_fill(~rest, -math.inf)
    number = torch.arange(-(-logits.shape[-1] // block), device=logits.device)
    whole = (number >= -(-sink // block)) & (number < (n - local).clamp(min=0) // block)
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % block), value=-math.inf)
    masses = padded.unflatten(-1, (-1, block)).logsumexp(-1).masked_fill_(~whole, -math.inf)

    found = {
        "keys": context - _spare(logits, rest, missed),
        "block_keys": context - block * _spare(masses, whole, missed),
    }
    below = (logits - _largest(logits)).masked_fill_(~rest, 0.0)
    count = rest.sum(-1).clamp(min=1)
    weight = below.exp().masked_fill_(~rest, 0.0)
    total = weight.sum(-1).clamp(min=torch.finfo(weight.dtype).tiny)
    entropy = total.log() - torch.linalg.vecdot(weight, below) / total
    found["support"] = torch.where(rest.any(-1), entropy.clamp(min=0).exp(), 0.0)
    found["logit_range"] = -below.amin(-1)
    mean = below.sum(-1) / count
    deviation = (below - mean[..., None]).masked_fill_(~rest, 0.0)
    found["logit_std"] = (deviation.square_().sum(-1) / count).sqrt()
    return found


def _spare(logits: Tensor, candidates: Tensor, missed: float) -> Tensor:
    """The most candidates, bool [R, N], that have at most the share `missed` of their mass.

    logits [H, R, N], -inf where there is no candidate; int64 [H, R].
    """
    weight = (logits - _largest(logits)).exp().sort(-1).values.cumsum(-1)
    spare = weight <= missed * (1 + _ROUNDING) * weight[..., -1:]
    # What is no candidate weighs nothing, and comes first.
    return spare.sum(-1) - (~candidates).sum(-1)


def _largest(logits: Tensor) -> Tensor:
    """[H, R, 1], finite also where there is no logit."""
    return logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
