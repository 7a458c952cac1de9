"""How large logits can be, from weight norms; how many keys an average needs.

s_j = x_i^T W x_j with W = W_Q W_K^T / sqrt(d) [d_model, d_model], of one head. Reconstructed: the
assumptions are those of arXiv 2404.02690, the constants are not known to be its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_sparse.theory.values import Value, at_least, positive, share


def product_norm(w_q: Tensor, w_k: Tensor) -> Tensor:
    """||W_Q W_K^T||_F of factors [..., d_model, d_head], float64 [...].

    sqrt(tr((W_Q^T W_Q)(W_K^T W_K))): no d_model x d_model product, and none of it is kept. Exact,
    to about 1e-8 of ||W_Q|| ||W_K|| where the product is nearly 0. Divide by sqrt(d_head) for the W
    of this module. A `torch.nn.Linear` holds the transpose: pass `weight.mT`.
    """
    if w_q.shape[-1] != w_k.shape[-1]:
        raise ValueError(
            "product_norm needs factors of equal d_head, [..., d_model, d_head], got "
            f"{tuple(w_q.shape)} and {tuple(w_k.shape)}"
        )
    q, k = w_q.double(), w_k.double()
    return ((q.mT @ q) * (k.mT @ k)).sum((-2, -1)).clamp(min=0).sqrt()


def logit_scale(input_bound: Value, weight_norm: Value) -> Tensor:
    """R = B^2 ||W||_F: what R_i = B ||W^T x_i||_2 is at most, in root mean square over rows.

    Assumes rows x_i with uncorrelated entries of mean 0 and |x| <= B (a root mean square <= B is
    enough). It is **not** a bound of each R_i: |x| <= B entry by entry allows ||x_i|| =
    B sqrt(d_model), and a row along the first singular vector of W has an R_i up to sqrt(d_model)
    times R; `worst_row_logit_scale` bounds every row.
    """
    return at_least("input_bound", input_bound, 0) ** 2 * at_least("weight_norm", weight_norm, 0)


def worst_row_logit_scale(input_bound: Value, weight_norm: Value, d_model: Value) -> Tensor:
    """sqrt(d_model) B^2 ||W||_F: R_i = B ||W^T x_i||_2 of any row with |x| <= B entry by entry.

    No other assumptions; attained by W of rank 1 and x_i along it.
    """
    return at_least("d_model", d_model, 1).sqrt() * logit_scale(input_bound, weight_norm)


def logit_tail(t: Value, r: Value) -> Tensor:
    """P(|s_j| >= t) <= 2 exp(-t^2 / 2 r^2), at most 1; r is the row's R_i.

    Assumes, for a fixed row i and a key j other than it, independent entries of x_j with mean 0 and
    |x| <= B (Hoeffding). Entries that share a mean shift all logits of the row, which the softmax
    does not see but this bound does: it fails for them.
    """
    ratio = at_least("t", t, 0) / positive("r", r)
    return (2 * torch.exp(-(ratio**2) / 2)).clamp(max=1)


def largest_logit_bound(r: Value, n: Value, delta: Value) -> Tensor:
    """M = r sqrt(2 ln(2n / delta)): max |s_j| of a row of n keys, with probability 1 - delta.

    `logit_tail` united over the keys, under its assumptions; r is the row's R_i. Where M lies far
    above the logits that are measured it says nothing about them.
    """
    keys = at_least("n", n, 1)
    return at_least("r", r, 0) * (2 * (2 * keys / share("delta", delta)).log()).sqrt()


def keys_floor(value_bound: Value, n: Value, dim: Value, delta: Value, error: Value) -> Tensor:
    """The log floor 2 B_v^2 ln(2 n dim / delta) / error^2: so many keys are enough for the averages
    of all n rows to be within `error` of their mean.

    Norm: entrywise (max) on outputs of `dim` entries, all n rows at once, with probability
    1 - delta. Assumes equal weights, the most favourable ones, and independent values of mean 0
    with |v| <= value_bound (Hoeffding, united over n * dim entries). It is sufficient; that nothing
    of order less than ln n can be is the claim of arXiv 2404.02690.
    """
    scale = at_least("value_bound", value_bound, 0) / positive("error", error)
    entries = at_least("n", n, 1) * at_least("dim", dim, 1)
    return 2 * scale**2 * (math.log(2) + entries.log() - share("delta", delta).log())
