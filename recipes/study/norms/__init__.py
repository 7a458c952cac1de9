"""`lit-sparse study norms`: length and weight norms, and where attention collapses."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np

from lit_sparse import theory
from lit_sparse.recipes.study.findings import Findings, Settings, Table
from lit_sparse.recipes.study.norms import figures
from lit_sparse.recipes.study.norms.measure import (
    DELTA,
    FEW,
    FEW_HOLD,
    GAMMAS,
    GROWTHS,
    ONE_HOLDS,
    STATISTICS,
    Measured,
    measure,
)
from lit_sparse.recipes.study.norms.verdicts import exponent, threshold, verdicts
from lit_sparse.recipes.study.stats import log_slope, mean_of


def run(settings: Settings) -> Findings:
    measured = measure(settings)
    shortest, longest = measured.lengths[0], measured.lengths[-1]
    at_one = 1 - float(measured.at_gamma["entropy ratio"][:, -1, GAMMAS.index(1.0)].mean())
    return Findings(
        question="How do length and weight norms decide how many keys a row's mass lies on, and "
        "from where on does it collapse?",
        method=f"Tokens of independent entries -1 or 1, Gaussian W_Q and W_K, the last row of n = "
        f"{shortest} to {longest} tokens in {measured.heads} heads, {measured.repetitions} "
        "independent repetitions. For the phase diagram each row's logits are scaled to the sigma "
        "of a gamma; for the growth of norms R = B^2 ||W||_F is set. Two criteria of collapse: a "
        f"single key, or {FEW} keys, have more than half of a row's mass. Intervals are 95 %, a "
        "bootstrap over repetitions.",
        verdicts=verdicts(measured),
        tables=[
            _thresholds(measured),
            _temperatures(measured),
            _growths(measured),
            _bounds(measured),
            _grid(measured),
        ],
        charts=figures.all_of(measured),
        notes=[
            f"gamma read off the entropy (1 - H / ln n) is {at_one:.2f} at gamma = 1 and n = "
            f"{longest}: a monitor that waits for 1 waits for far larger logits.",
            f"{FEW} keys are n^c of n, c = ln {FEW} / ln n, which at leading order have half of "
            "the mass from gamma = 1 - c on: the finite-size shift in the first table.",
        ],
        seeds=[settings.seed],
    )


def _thresholds(measured: Measured) -> Table:
    rows = []
    for place, n in enumerate(measured.lengths):
        few, one = (threshold(measured, place, name) for name in (FEW_HOLD, ONE_HOLDS))
        sigma = float(theory.collapse_sigma(n))
        row = [n, sigma, *astuple(few), few.mean - 1, 1 - math.log(FEW) / math.log(n)]
        rows.append([*row, few.mean**0.5 * sigma, *astuple(one), one.mean**0.5 * sigma])
    few_columns = (f"gamma, {FEW} keys", "low", "high", "shift from 1", "1 - ln 16 / ln n", "sigma")
    return Table(
        "thresholds",
        f"Where half of the rows have half of their mass on {FEW} keys, and on one",
        (
            "n",
            "sigma at gamma 1",
            *few_columns,
            "gamma, one key",
            "its low",
            "its high",
            "its sigma",
        ),
        rows,
    )


def _temperatures(measured: Measured) -> Table:
    rows = []
    for place, gamma in enumerate(GAMMAS):
        slope = log_slope(measured.lengths, measured.at_gamma["support"][:, :, place])
        last = {name: float(measured.at_gamma[name][:, -1, place].mean()) for name in STATISTICS}
        rows.append(
            [
                gamma,
                *astuple(slope),
                float(theory.rem_exponent(gamma)),
                1 - last["entropy ratio"],
                last["max weight"],
                float(theory.rem_max_weight(gamma, measured.lengths[-1])),
                last["collision"],
                max(0.0, 1 - gamma**-0.5),
                last[f"mass of {FEW} keys"],
                last["mass of n^.5 keys"],
            ]
        )
    collision = ("sum p^2", "its limit 1 - gamma^-1/2")
    weights = ("max weight", "n^-(1-sqrt(gamma))^2", *collision, f"{FEW} keys", "n^.5 keys")
    return Table(
        "temperatures",
        f"By gamma: C of exp(entropy) over all n, and rows at n = {measured.lengths[-1]}",
        ("gamma", "C", "low", "high", "1 - gamma", "gamma of entropy", *weights),
        rows,
    )


def _growths(measured: Measured) -> Table:
    rows = []
    for growth in GROWTHS:
        for place in (0, -1):
            n = measured.lengths[place]
            shown = ("support", "max weight", "mass of n^.5 keys", FEW_HOLD, ONE_HOLDS)
            means = [float(measured.of[name, growth.name][:, place].mean()) for name in shown]
            gamma = float(theory.gamma(growth.radius(n), n))
            rows.append([growth.name, *astuple(exponent(measured, growth.name)), n, gamma, *means])
    exponents = ("R", "C", "low", "high", "n", "gamma")
    statistics = ("exp(entropy)", "max weight", "mass of n^.5 keys")
    return Table(
        "growths",
        "How R grows: C of exp(entropy), and rows at the shortest and the longest n",
        (*exponents, *statistics, f"share: {FEW_HOLD}", f"share: {ONE_HOLDS}"),
        rows,
    )


def _bounds(measured: Measured) -> Table:
    rows = []
    for entries, found in measured.bounds.items():
        for place, n in enumerate(measured.lengths):
            largest = found.largest[:, place]
            ratios = [
                float((bound[:, place] / largest).mean())
                for bound in (found.of_row, found.of_radius, found.of_worst_row)
            ]
            fails = float(np.mean(largest > found.of_row[:, place]))
            std = float(found.std[:, place].mean())
            rows.append([entries, n, std, *astuple(mean_of(largest.mean(1))), *ratios, fails])
    measures = ("entries", "n", "std", "largest", "low", "high")
    return Table(
        "bounds",
        f"The largest |logit| at R = 1, and how many times it the bound M is (delta {DELTA:g})",
        (*measures, "M of R_i", "M of R", "M of the worst row", "share above M of R_i"),
        rows,
    )


def _grid(measured: Measured) -> Table:
    rows = [
        [n, gamma, *(float(measured.at_gamma[name][:, i, j].mean()) for name in STATISTICS)]
        for i, n in enumerate(measured.lengths)
        for j, gamma in enumerate(GAMMAS)
    ]
    return Table("grid", "All n and gamma", ("n", "gamma", *STATISTICS), rows, in_report=False)
