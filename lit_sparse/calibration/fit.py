"""The law k(n) = k_ref (n / n_ref)^C of every head, with what is known of it and what speaks
against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_sparse.calibration.forms import FORMS, compare_forms
from lit_sparse.calibration.needs import Needs
from lit_sparse.calibration.quantiles import (
    quantile_lines,
    resample,
    row_quantiles,
    standard_error,
    widening,
)

Verdict = Literal["power", "constant", "proportional", "no power law"]

PROPORTIONAL = 0.9
"""Exponent from which a need is taken as proportional to the context."""

# From which it is so where a proportional form is the best one.
_NEARLY = 0.8

MIN_DOCUMENTS = 8
_MIN_LENGTHS = 3
_MIN_RANGE = 4

# Contexts of documents that differ by less are of one length.
_SAME_LENGTH = 1.25

# Difference of BIC that is strong evidence (Kass and Raftery 1995).
_STRONG = 6.0

# Change of the exponent over the measured contexts that is more than a drift.
_BEND = 0.3


@dataclass(frozen=True)
class HeadFits:
    """What a need looks like as a function of n; tensors are float64 [layers, heads].

    Intervals are of 95 %, from a bootstrap over documents, widened by what counting in whole keys
    or blocks may hide. In simulations of 32 documents with effects of their own those of C hold the
    truth in 92 to 94 of 100 cases, those of k_ref in 88 to 96.
    """

    n_ref: float
    """Geometric mean of the measured contexts: there level and exponent are nearly uncorrelated."""
    k_ref: Tensor
    """Keys that the given quantile of rows is content with, at n_ref, for `exponent`."""
    k_ref_low: Tensor
    k_ref_high: Tensor
    exponent: Tensor
    """C: the measured one drawn to its layer's median by as much as it is uncertain, in [0, 1]."""
    raw_exponent: Tensor
    """C as measured."""
    exponent_low: Tensor
    """Interval of the measured C, not clipped."""
    exponent_high: Tensor
    support_exponent: Tensor
    """Slope of ln exp(H) on ln n, H the entropy of the rest: a second view of C without a target
    mass."""
    curvature: Tensor
    """Gain of C with every doubling of the context; above 0 the log-log curve is convex."""
    curvature_error: Tensor
    """Its standard error."""
    model: list[list[str]]
    """The form of least BIC, of `forms.FORMS`."""
    misfit: Tensor
    """BIC of the power law - that of the best form; above 6 is strong evidence against it."""
    linear_gain: Tensor
    """BIC of the power law - that of the linear form."""
    logit_range: Tensor
    """Mean range of the rest's logits at n_ref, in nats."""
    logit_range_slope: Tensor
    """What it gains as ln n gains 1."""
    which: str
    quantile: float
    missed: float
    always: int
    """Tokens that are always kept, sink and local."""
    documents: int
    shortest: int
    longest: int
    """Least and most context that was measured."""
    layers: tuple[int, ...]
    """Number of each layer in the model."""

    @property
    def bend(self) -> Tensor:
        """Change of C from the shortest to the longest measured context."""
        return self.curvature * self._doublings

    @property
    def _doublings(self) -> float:
        return math.log2(self.longest / self.shortest)

    @property
    def convex(self) -> Tensor:
        """bool: C grows with n for certain, and by more than a tenth over what was measured."""
        return (self.curvature > 2 * self.curvature_error) & (self.bend > 0.1)

    @property
    def verdict(self) -> list[list[Verdict]]:
        """Of every head, the first that holds:

        - "proportional": C is .9 or more; or a proportional form is the best one, C .8 or more, and
          .9 within its interval; or the linear form is much better than the power law, as where
          keys that are always kept hide that the need of the others is in proportion;
        - "no power law": C changes by more than .3 over the measured contexts, or a curve that is
          none is much better;
        - "constant": the best form is;
        - "power".
        """
        certain = self.bend.abs() - 2 * self.curvature_error * self._doublings > _BEND
        return [
            [self._verdict(layer, head, bool(certain[layer, head])) for head in range(len(models))]
            for layer, models in enumerate(self.model)
        ]

    def _verdict(self, layer: int, head: int, bent: bool) -> Verdict:
        model = self.model[layer][head]
        exponent, high = float(self.exponent[layer, head]), float(self.exponent_high[layer, head])
        # Short rows scatter more, so that their upper quantile hides a part of what C should be.
        likely = model in ("linear", "gaussian") and exponent >= _NEARLY and high >= PROPORTIONAL
        certain = self.linear_gain[layer, head] > _STRONG
        if exponent >= PROPORTIONAL or likely or certain:
            return "proportional"
        if bent or (model in ("log", "gaussian") and self.misfit[layer, head] > _STRONG):
            return "no power law"
        return "constant" if model == "constant" else "power"

    def keys_at(self, n: float | Tensor) -> Tensor:
        """What the laws say for contexts n [...], as [..., layers, heads]; at most n."""
        context = _contexts(n)
        return torch.minimum(self.k_ref * (context / self.n_ref) ** self.exponent, context)

    def band_at(self, n: float | Tensor) -> tuple[Tensor, Tensor]:
        """Least and most keys of the 95 % band around the laws; at most n."""
        context = _contexts(n)
        centre, away = self.keys_at(n).log(), (context / self.n_ref).log()
        tilt = (self.exponent_high - self.exponent_low) / 2 * away
        below = ((self.k_ref / self.k_ref_low).log().square() + tilt.square()).sqrt()
        above = ((self.k_ref_high / self.k_ref).log().square() + tilt.square()).sqrt()
        low, high = (centre - below).exp(), (centre + above).exp()
        return torch.minimum(low, context), torch.minimum(high, context)


def fit_heads(
    needs: Needs,
    which: Literal["keys", "block_keys"] = "block_keys",
    quantile: float = 0.9,
    samples: int = 200,
    seed: int = 0,
) -> HeadFits:
    """Fit k(n) = k_ref (n / n_ref)^C to every head: a quantile regression of ln k on ln(n / n_ref).

    The exponent of a head is then drawn to the median of its layer, and k_ref is the quantile of
    what that exponent leaves over.

    Args:
        needs: at least 8 documents, of at least 3 lengths, whose contexts span a factor 4.
        which: "keys" or "block_keys".
        quantile: share of the rows that the law shall satisfy.
        samples: of the bootstrap over documents.
        seed: of the bootstrap.

    Raises:
        ValueError: too few documents, or contexts too short to fit a law; an option is out of its
            range.
    """
    if which not in ("keys", "block_keys"):
        raise ValueError(f"fit_heads: which must be 'keys' or 'block_keys', got {which!r}")
    if not 0 < quantile < 1:
        raise ValueError(f"fit_heads: quantile must lie strictly between 0 and 1, got {quantile}")
    if samples < 20:
        raise ValueError(f"fit_heads: samples must be at least 20, got {samples}")
    documents = _check(needs)
    log_n = needs.context.double().log()
    n_ref = float(log_n.mean().exp())
    x = log_n - log_n.mean()
    shape = needs.keys.shape[1:]

    def by_head(values: Tensor) -> Tensor:
        return values.double().flatten(1).T.contiguous()

    y = by_head(getattr(needs, which)).log()
    support = by_head(needs.support).clamp(min=1).log()
    drawn = resample(needs.document, samples, seed)
    raw = quantile_lines(x, y, torch.ones(1, len(x)), quantile)[1][0]
    # Single precision is enough for how much the lines scatter.
    lines = quantile_lines(x, y.float(), drawn, quantile)
    level_error, slope_error = (standard_error(v.double(), documents) for v in lines)
    wide = widening(documents)
    level_width, slope_width = wide * level_error, wide * slope_error
    # A need is counted in whole keys or blocks, upwards: what that may hide is no matter of chance.
    counted = (1 if which == "keys" else needs.block) / y.exp()
    slope_width += counted @ (-x).clamp(min=0) / x.square().sum()
    exponent = _shrink(raw.view(shape), slope_error.view(shape)).clamp(0, 1)
    left = row_quantiles(y - exponent.reshape(-1, 1) * x, quantile)

    curvature = _curvatures(x, y, torch.cat([torch.ones(1, len(x)), drawn]).double())
    ranges = by_head(needs.logit_range)
    bic = _by_document(needs, which, x, y, by_head(needs.logit_std), log_n.mean())
    best = bic.argmin(0)
    return HeadFits(
        n_ref=n_ref,
        k_ref=left.exp().view(shape),
        k_ref_low=(left - level_width - counted.mean(1)).exp().view(shape),
        k_ref_high=(left + level_width).exp().view(shape),
        exponent=exponent,
        raw_exponent=raw.view(shape),
        exponent_low=(raw - slope_width).view(shape),
        exponent_high=(raw + slope_width).view(shape),
        support_exponent=_slope(x, support).view(shape),
        curvature=curvature[0].view(shape),
        curvature_error=standard_error(curvature[1:], documents).view(shape),
        model=[[FORMS[i] for i in layer] for layer in best.view(shape).tolist()],
        misfit=(bic[FORMS.index("power")] - bic.amin(0)).view(shape),
        linear_gain=(bic[FORMS.index("power")] - bic[FORMS.index("linear")]).view(shape),
        logit_range=ranges.mean(1).view(shape),
        logit_range_slope=_slope(x, ranges).view(shape),
        which=which,
        quantile=quantile,
        missed=needs.missed,
        always=needs.sink + needs.local,
        documents=documents,
        shortest=int(needs.context.min()),
        longest=int(needs.context.max()),
        layers=needs.layers,
    )


def separate_lengths(lengths: Sequence[int]) -> list[int]:
    """Of those that differ by less than a quarter the shortest; ascending."""
    found: list[int] = []
    for length in sorted(lengths):
        if not found or length >= _SAME_LENGTH * found[-1]:
            found.append(length)
    return found


def _contexts(n: float | Tensor) -> Tensor:
    """float64 [..., 1, 1], to stand beside layers and heads."""
    return torch.as_tensor(n, dtype=torch.float64)[..., None, None]


def _check(needs: Needs) -> int:
    """How many documents there are; ValueError where no law can be fitted."""
    ids, member = needs.document.unique(return_inverse=True)
    if len(ids) < MIN_DOCUMENTS:
        raise ValueError(
            f"fit_heads: {len(ids)} documents are too few to fit a law: measure at least "
            f"{MIN_DOCUMENTS}, better 32"
        )
    ends = torch.zeros(len(ids), dtype=torch.int64)
    ends = ends.scatter_reduce(0, member, needs.context, "amax")
    lengths = separate_lengths(ends.tolist())
    shortest, longest = int(needs.context.min()), int(needs.context.max())
    always = needs.sink + needs.local
    if shortest <= always:
        raise ValueError(
            f"fit_heads: contexts too short to fit a law: rows that see {shortest} tokens have no "
            f"others than the {always} that are always kept; measure longer ones, or keep fewer"
        )
    if len(lengths) < _MIN_LENGTHS or longest < _MIN_RANGE * shortest:
        raise ValueError(
            f"fit_heads: contexts too short to fit a law: {len(lengths)} lengths, contexts of "
            f"{shortest} to {longest} tokens; measure documents of at least {_MIN_LENGTHS} lengths "
            f"whose contexts span a factor of {_MIN_RANGE}"
        )
    return len(ids)


def _shrink(raw: Tensor, error: Tensor) -> Tensor:
    """Exponents [layers, heads] drawn to their layer's median (empirical Bayes): by the share of
    what they scatter by that their standard errors explain."""
    median = torch.quantile(raw, 0.5, dim=1, keepdim=True)
    noise = error.square()
    scatter = (raw - median).square().mean(1, keepdim=True)
    own = (scatter - noise.mean(1, keepdim=True)).clamp(min=0)
    tiny = torch.finfo(raw.dtype).tiny
    return median + (raw - median) * own / (own + noise).clamp(min=tiny)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Of least squares; x [N] of mean 0, y [P, N]."""
    return y @ x / x.square().sum()


def _curvatures(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Second derivative of y [P, N] along x [N] by least squares, in slope per doubling; [B, P]."""
    design = torch.stack([torch.ones_like(x), x, x.square()])
    weighted = weights[:, None] * design
    # A sample of documents of two lengths has no curvature of its own: the least one fits.
    inverse = torch.linalg.pinv(weighted @ design.T, hermitian=True)
    return 2 * math.log(2) * (inverse @ (weighted @ y.T))[:, 2]


def _by_document(
    needs: Needs, which: str, x: Tensor, y: Tensor, sigma: Tensor, mean: Tensor
) -> Tensor:
    """`compare_forms` of the documents' means."""
    documents, member = needs.document.unique(return_inverse=True)
    share = torch.nn.functional.one_hot(member, len(documents)).double()
    share /= share.sum(0)
    rest = needs.rest(which).double() @ share
    return compare_forms(x @ share + mean, y @ share, sigma @ share, needs.missed, rest)
