"""Collapse without training: one model's logits times a factor, and what becomes of its answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_sparse.callbacks import CollapseLimits
from lit_sparse.recipes.study.collapse.measure import Measured, Probe, measure
from lit_sparse.recipes.study.collapse.mends import scale_logits
from lit_sparse.recipes.study.stats import Estimate, crossing, mean_of, rank_correlation

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
    """What a task loses on one side."""

    cost: Estimate
    """Of the strongest factor: share of the prompts, paired by prompt."""
    rank: Estimate
    """Spearman's rank correlation of gamma and the share that is right, over factors; NaN where
    that is the same at every factor."""
    threshold: Estimate | None
    """Gamma, by sigma, where half of what the model answers as it is is lost; the interval over
    prompts. None where more is left at every factor."""


def fall(side: Scan, task: str, seed: int) -> Fall:
    """What becomes of a task that the model can do on a side of a scan."""
    right = np.stack([m.right[task] for m in side.measured], axis=1)
    gamma = np.array([m.sharpness["gamma"] for m in side.measured])
    share, sign = right.mean(0), 1 if gamma[-1] > gamma[0] else -1
    flat = np.ptp(share) == 0
    lost = crossing(sign * np.log(gamma), 1 - right / share[0], seed=seed)
    ends = sorted(math.exp(sign * end) for end in (lost.low, lost.high))
    return Fall(
        mean_of(right[:, 0] - right[:, -1], seed),
        Estimate(*[math.nan] * 3) if flat else rank_correlation(gamma, share, seed),
        None if math.isnan(lost.mean) else Estimate(math.exp(sign * lost.mean), *ends),
    )
