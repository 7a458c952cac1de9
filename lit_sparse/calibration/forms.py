"""Which form a head's need has as a function of the context: five of them, compared by BIC.

Documents are the observations, each with the mean over its rows of ln k and ln n: rows of one
document are not independent. Every form is fitted to ln k by least squares.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_sparse.theory import gaussian_keys_fraction

FORMS = ("constant", "log", "power", "linear", "gaussian")
"""k = a, k = a + b ln n, k = a n^C, k = always + a rest, and always + a rest Phi_c(sigma(n) +
Phi^-1(missed)): Gaussian logits whose sigma follows the straight line in ln n that was measured.
always + rest = n: counted with the keys that are always kept, a need in proportion to the others
looks like a power of n whose C is less than 1.
"""

_PARAMETERS = (1, 2, 2, 1, 1)

# Least variance of ln k: keys are whole numbers, and a form that meets them exactly is no better.
_LEAST = 1e-5

_SLOPES = 200

_ITERATIONS = 20


def compare_forms(x: Tensor, y: Tensor, sigma: Tensor, missed: float, rest: Tensor) -> Tensor:
    """The BIC of every form, [5, P] in the order of FORMS; least is best.

    Args:
        x: [D], mean of ln n of a document's rows.
        y: [P, D], mean of ln k, by head.
        sigma: [P, D], mean standard deviation of the logits, in nats.
        missed: share of the mass that k misses.
        rest: [D], mean number of keys that are not always kept.
    """
    documents, z = len(x), x - x.mean()
    spread = z.square().sum()
    level, slope = y.mean(1, keepdim=True), (y @ z / spread)[:, None]
    steady = (sigma.mean(1, keepdim=True) + (sigma @ z / spread)[:, None] * z).clamp(min=0)
    always = (x.exp() - rest).clamp(min=0)
    share = gaussian_keys_fraction(steady, missed).clamp(min=1e-12)
    residuals = (
        y - level,
        _log_residual(z, y),
        y - level - slope * z,
        _share_residual(y, always, rest.expand_as(y)),
        _share_residual(y, always, rest * share),
    )
    variance = torch.stack([r.square().mean(1) for r in residuals]).clamp(min=_LEAST)
    penalty = math.log(documents) * torch.tensor(_PARAMETERS, dtype=y.dtype)
    return documents * variance.log() + penalty[:, None]


def _log_residual(z: Tensor, y: Tensor) -> Tensor:
    """Of ln k = ln a + ln(1 + c z): the best c of a grid, from a constant to k = 0 at the least n.

    Linear in ln a alone, so c is searched.
    """
    best, least = _centred(y), torch.full_like(y[:, 0], math.inf)
    for c in torch.linspace(0, 1, _SLOPES + 1)[:-1].tolist():
        residual = _centred(y - torch.log1p(-c * z / z.min()))
        size = residual.square().sum(1)
        best = torch.where((size < least)[:, None], residual, best)
        least = torch.minimum(size, least)
    return best


def _share_residual(y: Tensor, always: Tensor, rest: Tensor) -> Tensor:
    """Of ln k = ln(always + a rest), [P, D]; the best a by Gauss and Newton from a = 1, in ln a."""
    log_a = torch.zeros_like(y[:, :1])
    for _ in range(_ITERATIONS):
        chosen = log_a.exp() * rest
        residual, slope = y - (always + chosen).log(), chosen / (always + chosen)
        step = (slope * residual).sum(1) / slope.square().sum(1).clamp(min=1e-30)
        log_a += step.clamp(-1, 1)[:, None]
    return y - (always + log_a.exp() * rest).log()


def _centred(y: Tensor) -> Tensor:
    return y - y.mean(1, keepdim=True)
