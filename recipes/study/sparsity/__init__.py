"""`lit-sparse study sparsity`: how many keys a row needs, and which error falls with n."""

from __future__ import annotations

from dataclasses import astuple

from lit_sparse.recipes.study.findings import Findings, Settings, Table
from lit_sparse.recipes.study.sparsity import figures
from lit_sparse.recipes.study.sparsity.measure import (
    BUDGETS,
    FIXED,
    FORMULA,
    GROWTHS,
    INDEPENDENT,
    LOSS_GROWTHS,
    MISSED,
    NORMS,
    WORST,
    WORST_BUDGETS,
    Measured,
    measure,
)
from lit_sparse.recipes.study.sparsity.verdicts import halves, slope, verdicts
from lit_sparse.recipes.study.stats import mean_of


def run(settings: Settings) -> Findings:
    measured = measure(settings)
    shortest, longest = measured.lengths[0], measured.lengths[-1]
    return Findings(
        question="How many of n keys hold a row's mass, how fast does that number grow, and which "
        "error of the largest k(n) keys falls with n?",
        method=f"Tokens of independent entries -1 or 1 (B = 1), Gaussian W_Q and W_K with "
        f"R = B^2 ||W||_F set, so that logits have the standard deviation R. The last row of n = "
        f"{shortest} to {longest} tokens in {measured.heads} heads, {measured.repetitions} "
        "independent repetitions; a shorter context is the nearest part of the longest. Kept are "
        "the k largest weights. Outputs are in root mean squares of a value; intervals are 95 %, "
        "a bootstrap over repetitions.",
        verdicts=verdicts(measured),
        tables=[
            _exponents(measured),
            _norms(measured),
            _worst(measured),
            _losses(measured),
            _keys(measured),
        ],
        charts=figures.all_of(measured),
        notes=[
            "`exp(entropy)` grows like n^(1 - gamma); k_eps at a fixed share of the mass grows "
            "faster at these lengths, as the closed form for Gaussian logits says.",
            "The worst of n rows is that of n independent draws of the values of the kept keys, "
            "held against a dense output of 0: rows of one context share values. The study "
            "`windows` has the largest error of n rows over the same keys.",
            f"Independent values have the error that the formula of kept and dropped weights says: "
            f"measured / formula is {_of_formula(measured)} over all budgets at {FIXED.name}.",
        ],
        seeds=[settings.seed],
    )


def _exponents(measured: Measured) -> Table:
    rows = []
    for growth in GROWTHS:
        early, late, _ = halves(measured, "keys", growth.name)
        keys, gaussian, support = (
            slope(measured, what, growth.name) for what in ("keys", "gaussian", "support")
        )
        local = early.mean, late.mean, gaussian.mean
        rows.append([growth.name, *astuple(keys), *local, *astuple(support), 1 - growth.gamma])
    columns = ("R", "C of k_eps", "low", "high", "shorter n", "longer n", "C of Gaussian logits")
    return Table(
        "exponents",
        f"Slopes on ln n of ln k_eps (fewest keys with {1 - MISSED:.0%} of the mass) and of the "
        "entropy",
        (*columns, "C of exp(entropy)", "its low", "its high", "1 - gamma"),
        rows,
    )


def _norms(measured: Measured) -> Table:
    """The theory's table of norms, measured."""
    rows = [
        [growth.name, budget, *(str(slope(measured, norm, growth.name, budget)) for norm in NORMS)]
        for growth in LOSS_GROWTHS
        for budget in BUDGETS
    ]
    title = "Slopes on ln n of what the k largest weights lose, by norm: below 0 it falls"
    return Table("norms", title, ("R", "k", *NORMS), rows)


def _losses(measured: Measured) -> Table:
    rows = []
    for growth in LOSS_GROWTHS:
        for budget in BUDGETS:
            for norm in NORMS:
                key = norm, growth.name, budget
                losses = measured.of[key].mean(0).tolist()
                rows.append([growth.name, budget, norm, *losses, *astuple(slope(measured, *key))])
    columns = ("R", "k", "norm", *_lengths(measured), "slope", "low", "high")
    return Table("losses", "The losses themselves", columns, rows, in_report=False)


def _worst(measured: Measured) -> Table:
    rows = []
    for budget in WORST_BUDGETS:
        key = WORST, FIXED.name, budget
        rows.append([budget, *measured.of[key].mean(0).tolist(), *astuple(slope(measured, *key))])
    return Table(
        "worst_rows",
        f"{FIXED.name}: the largest error of an output entry over n rows, values -1 or 1",
        ("k", *_lengths(measured), "slope", "low", "high"),
        rows,
    )


def _keys(measured: Measured) -> Table:
    rows = []
    for growth in GROWTHS:
        for place, n in enumerate(measured.lengths):
            keys, gaussian, support = (
                mean_of(measured.of[what, growth.name][:, place])
                for what in ("keys", "gaussian", "support")
            )
            rows.append(
                [growth.name, growth.radius(n), n, *astuple(keys), gaussian.mean, support.mean]
            )
    columns = ("R", "value of R", "n", "k_eps", "low", "high", "Gaussian logits", "exp(entropy)")
    return Table("keys", "Keys needed", columns, rows, in_report=False)


def _lengths(measured: Measured) -> list[str]:
    return [f"n = {n}" for n in measured.lengths]


def _of_formula(measured: Measured) -> str:
    ratios = [
        measured.of[INDEPENDENT, FIXED.name, budget] / measured.of[FORMULA, FIXED.name, budget]
        for budget in BUDGETS
    ]
    return str(mean_of(sum(ratios).mean(1) / len(ratios)))
