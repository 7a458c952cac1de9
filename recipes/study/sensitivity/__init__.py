"""`lit-sparse study sensitivity`: the assumptions relaxed step by step."""

from __future__ import annotations

from dataclasses import astuple

from lit_sparse.recipes.study.findings import Findings, Settings, Table
from lit_sparse.recipes.study.relaxed import OUTLIERS, TOPICS
from lit_sparse.recipes.study.sensitivity import figures
from lit_sparse.recipes.study.sensitivity.measure import (
    FEW,
    GAMMA,
    MISSED,
    PREDICTIONS,
    SIGMA,
    Measured,
    measure,
)
from lit_sparse.recipes.study.sensitivity.verdicts import broken, verdicts


def run(settings: Settings) -> Findings:
    measured = measure(settings)
    return Findings(
        question="How far are the predictions that take a row's sigma from what is measured when "
        "tokens are correlated, heavy-tailed, of outlier features, or repeated?",
        method=f"Rows as in the study `sparsity`, n = {measured.lengths[0]} to "
        f"{measured.lengths[-1]}, {measured.heads} heads, {measured.repetitions} repetitions, of "
        "tokens that break one assumption at a time; the values' tokens are of the same kind. Each "
        "row's logits are scaled to the sigma that is asked, so that the shape of their "
        "distribution is tested, and R apart. Predictions: k_eps, the keys with "
        f"{1 - MISSED:.0%} of the mass at sigma = {SIGMA:g} and the longest n, and C, its exponent "
        f"where sigma^2 / (2 ln n) = {GAMMA:g}, of Gaussian logits; collapse gamma, from which "
        f"{FEW} keys have half of the mass in half of the rows, of independent entries -1 or 1; "
        "the error of the output of n^.5 keys at sigma = 1 (at the longest n, and its slope on "
        "ln n), of independent values with the measured weights. Intervals are 95 %, a bootstrap "
        "over repetitions.",
        verdicts=verdicts(measured),
        tables=[_degradation(measured), _ratios(measured)],
        charts=figures.all_of(measured),
        notes=[
            "A shared mean shifts all logits of a row, which a softmax does not see, and the "
            "values' mean cancels in the output's error: the formula for it, which takes values "
            "of mean 0, is then too large.",
            f"Topics are {TOPICS}, outlier features {OUTLIERS} of those of the scores. With a "
            f"vocabulary in which a token is repeated more than {FEW} times, a few keys never have "
            "half of the mass: the collapse is onto a token, not onto a key.",
        ],
        seeds=[settings.seed],
    )


def _degradation(measured: Measured) -> Table:
    rows = [
        [
            case.family,
            case.level,
            *(str(case.ratios[name]) for name in PREDICTIONS),
            str(case.r_over_sigma),
            ", ".join(broken(case)) or "none",
        ]
        for case in (measured.base, *measured.cases)
    ]
    return Table(
        "degradation",
        "How fast predictions degrade: measured / predicted",
        ("relaxed", "level", *PREDICTIONS, "R / sigma", "broken"),
        rows,
    )


def _ratios(measured: Measured) -> Table:
    rows = [
        [case.family, case.level, name, *astuple(ratio)]
        for case in (measured.base, *measured.cases)
        for name, ratio in {**case.ratios, "R / sigma": case.r_over_sigma}.items()
    ]
    columns = ("relaxed", "level", "prediction", "measured / predicted", "low", "high")
    return Table("ratios", "The same as numbers", columns, rows, in_report=False)
