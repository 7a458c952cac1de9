"""The claims, and the rules by which the numbers decide on them."""

from __future__ import annotations

from collections import Counter

from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.sensitivity.measure import (
    FAMILIES,
    KEYS,
    PREDICTIONS,
    Case,
    Measured,
)
from lit_sparse.recipes.study.stats import Estimate

HOLDS = 0.8, 1.25
"""Measured / predicted of a prediction that holds."""

BOUNDED = "bounded entries"
"""The family that keeps the assumptions."""


def verdicts(measured: Measured) -> list[Verdict]:
    return [_under_assumptions(measured), _relaxed(measured), _radius(measured)]


def breaks(ratio: Estimate) -> bool:
    """The mean is out of `HOLDS`, and its interval does not have 1 in it."""
    return not HOLDS[0] <= ratio.mean <= HOLDS[1] and not ratio.low <= 1 <= ratio.high


def broken(case: Case) -> list[str]:
    return [name for name in PREDICTIONS if breaks(case.ratios[name])]


def first_broken(measured: Measured, family: str) -> Case | None:
    """The mildest level of a family at which a prediction breaks."""
    return next((c for c in measured.cases if c.family == family and broken(c)), None)


def _under_assumptions(measured: Measured) -> Verdict:
    kept = [measured.base, *(case for case in measured.cases if case.family == BOUNDED)]
    failures = [f"{case.level}: {_ratios(case, broken(case))}" for case in kept if broken(case)]
    return Verdict(
        "the predictions from the measured sigma hold for independent bounded entries",
        Outcome.of(not failures, not broken(measured.base)),
        "measured / predicted: "
        + "; ".join(f"entries {case.level}: {_ratios(case, PREDICTIONS)}" for case in kept),
        f"not for {'; '.join(failures)}" if failures else "",
    )


def _relaxed(measured: Measured) -> Verdict:
    """Supported where nothing breaks; with a limit where the number of keys does not."""
    relaxed = [family for family in FAMILIES if family != BOUNDED]
    firsts = {family: first_broken(measured, family) for family in relaxed}
    failures = {family: case for family, case in firsts.items() if case}
    first = Counter(name for case in failures.values() for name in broken(case))
    ever = Counter(
        name for case in measured.cases if case.family in relaxed for name in broken(case)
    )
    cases = sum(case.family in relaxed for case in measured.cases)
    mildest = "; ".join(
        f"{case.family} {case.level}: {_ratios(case, broken(case))}" for case in failures.values()
    )
    common = ", ".join(f"{name} ({count})" for name, count in first.most_common())
    counts = ", ".join(f"{name} {ever[name]}" for name in PREDICTIONS)
    return Verdict(
        "the predictions from the measured sigma hold when independence and boundedness do not",
        Outcome.of(not failures, 2 * ever[KEYS] < cases),
        f"of {cases} cases, those in which a prediction breaks (measured / predicted out of "
        f"{HOLDS[0]:g} to {HOLDS[1]:g}): {counts}",
        f"breaks first by {common} of {len(relaxed)} kinds. Mildest: {mildest}" if failures else "",
    )


def _radius(measured: Measured) -> Verdict:
    """With a limit where R is the logits' sigma for entries -1 or 1 only."""
    far = [case for case in measured.cases if breaks(case.r_over_sigma)]
    worst = max(measured.cases, key=lambda case: case.r_over_sigma.mean)
    uniform = next(case for case in measured.cases if case.family == BOUNDED)
    return Verdict(
        "R = B^2 ||W||_F says how large the logits are",
        Outcome.of(not far, not breaks(measured.base.r_over_sigma)),
        f"R / sigma: entries {measured.base.level} {measured.base.r_over_sigma}, {uniform.level} "
        f"{uniform.r_over_sigma}, {worst.family} {worst.level} {worst.r_over_sigma}",
        f"an upper bound only: far above sigma in {len(far)} of {len(measured.cases)} cases; "
        "sigma has to be measured"
        if far
        else "",
    )


def _ratios(case: Case, names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"{name} {case.ratios[name]}" for name in names)
