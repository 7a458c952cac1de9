"""The claims, and the rules by which the numbers decide on them."""

from __future__ import annotations

import numpy as np

from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.norms.measure import (
    BEYOND,
    DELTA,
    FASTER,
    FEW,
    FEW_HOLD,
    FIXED,
    GAMMAS,
    ONE_HOLDS,
    SAME_RATE,
    Measured,
)
from lit_sparse.recipes.study.stats import Estimate, crossing, log_slope, mean_of

BROKEN = (1 - SAME_RATE.gamma) / 2
"""Sparsity is broken where the exponent of the effective support is below half of what it is at the
rate that keeps it."""

NEARLY_ALL, NEARLY_NONE = 0.95, 0.05
"""Shares of rows."""

NEAR = 0.2
"""Relative distance within which a threshold is where it was predicted."""

TIGHT = 1.5
"""A bound says something of what it bounds up to so many times it."""


def verdicts(measured: Measured) -> list[Verdict]:
    return [_breaks(measured), _inevitable(measured), _threshold(measured), _bound(measured)]


def exponent(measured: Measured, growth: str) -> Estimate:
    """C of exp(entropy)."""
    return log_slope(measured.lengths, measured.of["support", growth])


def threshold(measured: Measured, place: int, criterion: str) -> Estimate:
    """The gamma from which half of the rows meet a criterion, at one length."""
    return crossing(GAMMAS, measured.at_gamma[criterion][:, place])


def _breaks(measured: Measured) -> Verdict:
    """Broken: below `BROKEN`, and for sure below the rate that keeps it. With a limit where growing
    like sqrt(ln n) breaks it too, with a larger constant."""
    exponents = {
        growth.name: exponent(measured, growth.name) for growth in (SAME_RATE, BEYOND, *FASTER)
    }
    kept_rate = exponents[SAME_RATE.name]
    broken = {
        name: found.mean < BROKEN and found.high < kept_rate.low
        for name, found in exponents.items()
    }
    breaks = all(broken[growth.name] for growth in FASTER)
    holds, beyond = kept_rate.low > BROKEN, broken[BEYOND.name]
    kept = mean_of(measured.of["mass of n^.5 keys", FASTER[-1].name][:, -1])
    return Verdict(
        "n^C sparsity breaks when weight norms grow faster than O(sqrt(log n))",
        Outcome.of(breaks and holds and not beyond, breaks and holds),
        f"C of exp(entropy) for {_listed(exponents)}",
        f"the constant counts too: C is gone for {BEYOND.name} (gamma = {BEYOND.gamma:g}). What "
        f"breaks is C > 0, not a budget: for {FASTER[-1].name}, n^.5 keys hold {kept} of the mass "
        f"at n = {measured.lengths[-1]}"
        if beyond
        else "",
    )


def _inevitable(measured: Measured) -> Verdict:
    """Nearly all rows collapse at the largest gamma, nearly none at the least; with a limit where
    that is true of a few keys and not of one."""
    at_least, at_most = (
        {name: measured.at_gamma[name][:, :, place].mean(0) for name in (FEW_HOLD, ONE_HOLDS)}
        for place in (0, -1)
    )
    collapse = {
        name: bool((at_least[name] <= NEARLY_NONE).all() and (at_most[name] >= NEARLY_ALL).all())
        for name in (FEW_HOLD, ONE_HOLDS)
    }
    first, *_, last = measured.of[FEW_HOLD, FIXED.name].mean(0)
    from_gamma = crossing(GAMMAS, measured.at_gamma[FEW_HOLD][:, -1], NEARLY_ALL)
    fast = measured.of[FEW_HOLD, FASTER[-1].name].mean(0)
    return Verdict(
        "attention collapse is inevitable under certain conditions",
        Outcome.of(all(collapse.values()), collapse[FEW_HOLD]),
        f"at n = {measured.lengths[-1]}, {FEW} keys have half of the mass in {NEARLY_ALL:.0%} of "
        f"rows from gamma = {from_gamma} on. For {FASTER[-1].name} the share of such rows is "
        f"{fast[0]:.2f} at the shortest n, {fast[-1]:.2f} at the longest; for {FIXED.name} "
        f"{first:.2f} and {last:.2f}: at fixed norms length undoes it",
        ""
        if all(collapse.values())
        else f"it is a few keys that take the row: a single one has half in "
        f"{at_most[ONE_HOLDS][-1]:.2f} of rows at gamma = {GAMMAS[-1]:g}"
        if collapse[FEW_HOLD]
        else "not in nearly all rows even at the largest gamma, or in some at the least",
    )


def _threshold(measured: Measured) -> Verdict:
    """With a limit where gamma = 1 lies between few keys and a single one having half."""
    few, one = (threshold(measured, -1, name) for name in (FEW_HOLD, ONE_HOLDS))
    first = threshold(measured, 0, FEW_HOLD)
    near = all(abs(found.mean - 1) <= NEAR for found in (few, one))
    return Verdict(
        "rows collapse at gamma = sigma^2 / (2 ln n) = 1",
        Outcome.of(near, few.mean < 1 < one.mean),
        f"half of the rows at n = {measured.lengths[-1]}: {FEW} keys have half of the mass from "
        f"gamma = {few} on ({first.mean:.2f} at n = {measured.lengths[0]}), one key from {one}",
        ""
        if near
        else f"no sharp point at these n: {FEW} keys take half before it, one key only after it"
        if few.mean < 1 < one.mean
        else "1 is on one side of both",
    )


def _bound(measured: Measured) -> Verdict:
    """The bound must hold; with a limit where it is more than TIGHT times what it bounds."""
    ratios, fails = {}, {}
    for entries, found in measured.bounds.items():
        ratios[entries] = mean_of((found.of_row / found.largest).mean(2)[:, -1])
        fails[entries] = float((found.largest > found.of_row).mean())
    holds = max(fails.values()) <= DELTA
    loose = {entries: ratio for entries, ratio in ratios.items() if ratio.mean > TIGHT}
    worst = np.mean(
        [(found.of_worst_row / found.largest).mean() for found in measured.bounds.values()]
    )
    return Verdict(
        f"the largest logit is at most M = R_i sqrt(2 ln(2n / delta)), delta = {DELTA:g} "
        "(reconstructed)",
        Outcome.of(holds and not loose, holds),
        f"M / measured at n = {measured.lengths[-1]}, entries {_listed(ratios)}; it fails in "
        f"{max(fails.values()):.3f} of rows at most. From norms alone (any row), M is "
        f"{worst:.0f} times the largest logit",
        f"says little for entries {_listed(loose)} times the largest logit: their "
        "variance is a third of B^2"
        if loose
        else "",
    )


def _listed(estimates: dict[str, Estimate]) -> str:
    return "; ".join(f"{name}: {estimate}" for name, estimate in estimates.items())
