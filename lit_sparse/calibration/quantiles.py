"""Quantile regression of many heads at once, and its bootstrap over documents."""

from __future__ import annotations

import torch
from torch import Tensor

BANDWIDTH = 0.06
"""Smoothing of the check loss, in standard deviations of a head's residuals; where few are far off,
nearer that of the others."""

# Quantiles a standard deviation off the mean of a normal distribution.
_MIDDLE = (0.1587, 0.8413)

_CHUNK_BYTES = 32 * 2**20

# Values that torch.quantile takes at once.
_LARGEST = 2**24

# Powers of the last bandwidth: from a wide loss, nearly a parabola, to the final one, so that each
# start lies where Newton's step holds.
_STEPS = (0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1, 1, 1, 1, 1)

# Least curvature, as a share of the largest that the loss can have.
_RIDGE = 1e-3


def quantile_lines(x: Tensor, y: Tensor, weights: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """The lines intercept + slope * x under which the share `quantile` of y lies.

    Minimises the check loss of quantile regression (Koenker and Bassett 1978), smoothed by a
    logistic kernel so that Newton's method solves every head and every set of weights at once. The
    smoothing moves a line by about 1 % of the residuals' standard deviation.

    Args:
        x: [N], with at least two different values.
        y: [P, N], one line of data a head.
        weights: [B, N], not negative.
        quantile: strictly between 0 and 1.

    Returns:
        Intercepts and slopes, [B, P] each, in the dtype of y.
    """
    centre, spread = x.mean(), x.std(correction=0)
    z = ((x - centre) / spread).to(y.dtype)
    design = torch.stack([torch.ones_like(z), z])
    start = torch.linalg.lstsq(design.T, y.T).solution.T
    residual = y - start @ design
    shift = row_quantiles(residual, quantile)
    # Where a line is exact there is nothing to scale by: a relative rounding of y takes the place.
    least = 1e-6 * y.abs().amax(1).clamp(min=1)
    scale = residual.std(1, correction=0).clamp(min=least)
    low, high = (row_quantiles(residual, q) for q in _MIDDLE)
    width = BANDWIDTH * ((high - low) / 2 / scale).clamp(0.3, 1)
    target = (residual - shift[:, None]) / scale[:, None]

    moments = torch.stack([weights, weights * z, weights * z * z], dim=-1).to(y.dtype)
    found = y.new_zeros(len(weights), *start.shape)
    step = max(_CHUNK_BYTES // (target.element_size() * weights.numel()), 1)
    for begin in range(0, len(y), step):
        part = slice(begin, begin + step)
        for power in _STEPS:
            line, now = found[:, part], width[part, None] ** power
            line += _newton(target[part], design, moments, line, now, quantile)
    found = found * scale[:, None] + start
    found[..., 0] += shift
    slope = found[..., 1] / spread
    return found[..., 0] - slope * centre, slope


def row_quantiles(values: Tensor, quantile: float) -> Tensor:
    """[P, N] -> [P], however many values there are."""
    step = max(_LARGEST // values.shape[1], 1)
    return torch.cat([torch.quantile(part, quantile, dim=1) for part in values.split(step)])


def _newton(
    y: Tensor, design: Tensor, moments: Tensor, line: Tensor, width: Tensor, quantile: float
) -> Tensor:
    """The step of `line` [B, P, 2] to y [P, N]; design [2, N], moments [B, N, 3] of weighted z;
    width [P, 1]."""
    above = torch.baddbmm(y[None], line, design.expand(len(line), -1, -1), alpha=-1)
    above = above.div_(width).sigmoid_()
    curvature = torch.bmm(above - above.square(), moments) / width
    slope = torch.bmm(above.add_(quantile - 1), moments[..., :2])
    # Of all z: the rows of one sample may have a single z.
    floor = _RIDGE / (4 * width) * moments[..., :1].sum(1)[:, None] * y.new_tensor([1, 0, 1])
    a, b, c = (curvature + floor).unbind(-1)
    g, h = slope.unbind(-1)
    found = torch.stack([c * g - b * h, a * h - b * g], -1) / (a * c - b * b)[..., None]
    # The logistic loss changes its curvature by at most a factor e over a width: the damping that
    # makes Newton's method descend from anywhere (Sun and Tran-Dinh 2019).
    length = (found.abs() * design.abs().amax(1)).sum(-1, keepdim=True) / width
    return found * (length.log1p() / length.clamp(min=1e-6))


def resample(document: Tensor, samples: int, seed: int) -> Tensor:
    """float32 [samples, N]: how often each row counts when documents are drawn with repetition."""
    documents, member = document.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(documents), (samples, len(documents)), generator=generator)
    counts = torch.zeros(drawn.shape).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return counts[:, member]


def standard_error(values: Tensor, documents: int) -> Tensor:
    """Of an estimate, from its bootstrap samples [samples, ...] over so many documents.

    From the middle 68 %: a sample that happens to have documents of a single length says nothing,
    and must not count.
    """
    low, high = torch.quantile(values, torch.tensor(_MIDDLE).to(values), dim=0)
    return (documents / (documents - 2)) ** 0.5 * (high - low) / 2


def widening(documents: int) -> float:
    """Standard errors on either side of an estimate that make its 95 % interval: Student's t."""
    z, freedom = 1.96, documents - 2
    # Cornish and Fisher's expansion of the quantile.
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
