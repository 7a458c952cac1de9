"""Collapse without training: one model's logits times a factor, and what becomes of its answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_sparse.callbacks import CollapseLimits
from lit_sparse.recipes.study.collapse.measure import Measured, Probe, measure
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

    def only(self, tasks: Sequence[str]) -> Scan:
        """Without the other tasks."""
        measured = [
            replace(m, right={name: m.right[name] for name in tasks}) for m in self.measured
        ]
        return Scan(self.factors, measured)

    def side(self, concentrated: bool) -> Scan:
        """From the model as it is to the strongest concentration, or dispersion."""
        pairs = list(zip(self.factors, self.measured, strict=True))
        if concentrated:
            chosen = [pair for pair in pairs if pair[0] >= 1]
        else:
            chosen = [pair for pair in pairs if pair[0] <= 1][::-1]
        return Scan(*map(list, zip(*chosen, strict=True)))

    def lost(self, share: float) -> float | None:
        """The factor nearest to 1 from which on no more than `share` of the answers is left, of a
        `side`; None where none does that.
        """
        found = None
        for factor, own in list(zip(self.factors, self.measured, strict=True))[:0:-1]:
            if own.accuracy > share * self.measured[0].accuracy:
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


@dataclass(frozen=True)
class Fall:
    """What a task loses on one side; intervals are over prompts."""

    cost: Estimate
    """Of the strongest factor: share of the prompts, paired."""
    rank: Estimate | None
    """Spearman's rank correlation of gamma and the share that is right; None where that is the same
    at every factor."""
    threshold: Estimate | None
    """Gamma, by sigma, where half of what the model answers as it is is left; None where more is
    at every factor."""


def fall(side: Scan, task: str, seed: int, draws: int = 1000) -> Fall:
    """What becomes of a task on a side of a scan."""
    right = np.stack([m.right[task] for m in side.measured])
    gamma = np.array([m.sharpness["gamma"] for m in side.measured])
    picks = np.random.default_rng(seed).integers(right.shape[1], size=(draws, right.shape[1]))
    # What is measured first, then what is drawn from it.
    shares = [right.mean(1), *(right[:, pick].mean(1) for pick in picks)]
    ranks = np.array([rank_correlation(gamma, share) for share in shares])
    places = np.array([half_place(gamma, share) for share in shares])
    crossed = np.isfinite(places[0]) and np.isfinite(places).mean() > 0.975
    return Fall(
        mean_of(right[0] - right[-1], seed),
        None if np.isnan(ranks).any() else _estimate(ranks),
        _estimate(places) if crossed else None,
    )


def _estimate(drawn: np.ndarray) -> Estimate:
    """Of a value and, behind it, what the bootstrap made of it."""
    return Estimate(float(drawn[0]), *np.nanpercentile(drawn[1:], [2.5, 97.5]).tolist())


def half_place(gamma: np.ndarray, share: np.ndarray) -> float:
    """Gamma at which a share falls below half of its first value for good, by a straight line over
    ln gamma; NaN where it does not.
    """
    half = share[0] / 2
    above = np.flatnonzero(share >= half)
    if half == 0 or above[-1] == len(share) - 1:
        return float("nan")
    i = above[-1]
    way = (share[i] - half) / (share[i] - share[i + 1])
    return float(np.exp((1 - way) * np.log(gamma[i]) + way * np.log(gamma[i + 1])))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, ties sharing their mean rank; NaN where one of them is constant."""
    first, second = (_ranks(values) - _ranks(values).mean() for values in (x, y))
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2
