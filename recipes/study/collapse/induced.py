"""Collapse without training: one model's logits times a factor, and what becomes of its answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_sparse.callbacks import CollapseLimits
from lit_sparse.recipes.study.collapse.measure import CHANCE, Measured, Probe, measure
from lit_sparse.recipes.study.collapse.mends import scale_logits
from lit_sparse.recipes.study.stats import Estimate, mean_of

_LIMITS = CollapseLimits()


@dataclass(frozen=True)
class Scan:
    """One model at one length, by factor on its logits; one of them is 1."""

    factors: Sequence[float]
    """Ascending."""
    measured: Sequence[Measured]

    @property
    def healthy(self) -> Measured:
        """The model as it is."""
        return self.measured[list(self.factors).index(1.0)]

    def side(self, concentrated: bool) -> Scan:
        """From the model as it is to the strongest concentration, or dispersion."""
        pairs = list(zip(self.factors, self.measured, strict=True))
        if concentrated:
            chosen = [pair for pair in pairs if pair[0] >= 1]
        else:
            chosen = [pair for pair in pairs if pair[0] <= 1][::-1]
        return Scan(*map(list, zip(*chosen, strict=True)))

    def lost(self, share: float) -> float | None:
        """The factor nearest to 1 from which on no more than `share` of what was answered above
        chance is left, of a `side`; None where none does that.
        """
        found = None
        left = kept(_right(self))
        for factor, own in list(zip(self.factors, left, strict=True))[:0:-1]:
            if own > share:
                break
            found = factor
        return found

    def warned(self) -> float | None:
        """The factor nearest to 1 at which a limit of `CollapseMonitor` is passed, that the model
        as it is did not pass; of a `side`, None where none is.
        """
        healthy = past_limits(self.healthy)
        new = (
            f for f, m in zip(self.factors, self.measured, strict=True) if past_limits(m) - healthy
        )
        return next(new, None)


def scan(
    model: Any, probe: Probe, factors: Sequence[float], progress: Callable[[str], None]
) -> Scan:
    """Measure copies of a model whose logits are multiplied by each factor."""
    found = []
    for factor in factors:
        progress(f"{probe.length} tokens, logits times {factor:g}")
        scaled = copy.deepcopy(model)
        scale_logits(scaled, factor)
        found.append(measure(scaled, probe))
    return Scan(factors, found)


def past_limits(measured: Measured) -> set[str]:
    """Which limits of `CollapseMonitor` a measurement is past: of single heads those that half of
    all heads pass.
    """
    sharp = measured.sharpness
    past = {
        "concentration": sharp["concentrated"] >= 0.5,
        "near_collapse": sharp["layer_gamma"] >= _LIMITS.gamma,
        "saturation": sharp["layer_saturated"] > _LIMITS.saturated_rows,
        "dispersion": sharp["dispersed"] >= 0.5,
    }
    return {name for name, holds in past.items() if holds}


def kept(right: np.ndarray) -> np.ndarray:
    """[factors]: the answers above chance, over those of the model as it is; of what is right on a
    side, [factors, prompts].
    """
    above = np.maximum(right.mean(1) - CHANCE, 0)
    return above / max(above[0], 1e-9)


@dataclass(frozen=True)
class Side:
    """What one direction shows; intervals are over prompts."""

    fall: Estimate
    """Share of answer tokens that the strongest factor costs, paired by prompt."""
    rank: Estimate | None
    """Spearman's rank correlation of gamma and the share of answer tokens that are right;
    None where none, or all, are right at every factor."""
    threshold: Estimate | None
    """Gamma, by sigma, where half of the answers above chance are left; None where more are at
    every factor."""


def judge(side: Scan, seed: int, draws: int = 1000) -> Side:
    """What a side of a scan shows."""
    right = _right(side)
    gamma = np.array([m.sharpness["gamma"] for m in side.measured])
    picks = np.random.default_rng(seed).integers(right.shape[1], size=(draws, right.shape[1]))
    drawn = [right[:, pick] for pick in picks]
    ranks = np.array([rank_correlation(gamma, own.mean(1)) for own in drawn])
    places = np.array([half_place(gamma, kept(own)) for own in [right, *drawn]])
    threshold = None
    if np.isfinite(places).mean() > 0.975 and np.isfinite(places[0]):
        threshold = _estimate(float(places[0]), places[1:])
    rank = rank_correlation(gamma, right.mean(1))
    return Side(
        mean_of(right[0] - right[-1], seed),
        None if np.isnan([rank, *ranks]).any() else _estimate(rank, ranks),
        threshold,
    )


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    return Estimate(value, *np.nanpercentile(drawn, [2.5, 97.5]).tolist())


def half_place(gamma: np.ndarray, left: np.ndarray) -> float:
    """Gamma at which `left` crosses 1/2 for good, by a straight line over ln gamma; NaN where it
    does not.
    """
    above = np.flatnonzero(left >= 0.5)
    if not len(above) or above[-1] == len(left) - 1:
        return float("nan")
    i = above[-1]
    share = (left[i] - 0.5) / (left[i] - left[i + 1])
    return float(np.exp((1 - share) * np.log(gamma[i]) + share * np.log(gamma[i + 1])))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, ties sharing their mean rank; NaN where one of them is constant."""
    first, second = (_ranks(values) - _ranks(values).mean() for values in (x, y))
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2


def _right(side: Scan) -> np.ndarray:
    """[factors, prompts]"""
    return np.stack([m.right for m in side.measured])
