"""The claims, and the rules by which the numbers decide on them."""

from __future__ import annotations

from collections.abc import Iterable

from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.sparsity.measure import (
    ENTRY,
    FIXED,
    GROWTHS,
    INDEPENDENT,
    LINEAR,
    LOGS,
    LOSS_GROWTHS,
    MASS,
    MISSED,
    POWERS,
    SHARP,
    WORST,
    Measured,
)
from lit_sparse.recipes.study.stats import Estimate, log_slope, log_slopes, mean_of

PROPORTIONAL = 0.95
"""Slope of ln k on ln n from which k counts as proportional to n."""

STEADY, LARGE, FALLS = -0.02, 0.5, -0.1
"""An error that stays O(1) has a slope of at least STEADY and is at least LARGE at the longest n;
one that does not has a slope of at most FALLS."""


def verdicts(measured: Measured) -> list[Verdict]:
    return [
        _exponent(measured),
        _entrywise(measured),
        _dropped_mass(measured),
        _output(measured),
        _log_floor(measured),
    ]


def slope(measured: Measured, *key: str) -> Estimate:
    """Of the logarithm on ln n, over all lengths."""
    return log_slope(measured.lengths, measured.of[key])


def halves(measured: Measured, *key: str) -> tuple[Estimate, Estimate, Estimate]:
    """The slope over the shorter and over the longer lengths, and the second less the first."""
    middle, values = len(measured.lengths) // 2, measured.of[key]
    early = log_slopes(measured.lengths[: middle + 1], values[:, : middle + 1])
    late = log_slopes(measured.lengths[middle:], values[:, middle:])
    return mean_of(early), mean_of(late), mean_of(late - early)


def _exponent(measured: Measured) -> Verdict:
    """C < 1 counts where the slope is below `PROPORTIONAL` and does not rise with n."""
    proportional = []
    for growth in GROWTHS:
        _, late, change = halves(measured, "keys", growth.name)
        if late.high >= PROPORTIONAL or change.low > 0:
            proportional.append(growth.name)
    early, late, _ = halves(measured, "keys", SHARP.name)
    numbers = [
        f"{growth.name}: slope of k_eps {slope(measured, 'keys', growth.name)}, of exp(entropy) "
        f"{slope(measured, 'support', growth.name)}, 1 - gamma = {1 - growth.gamma:g}"
        for growth in (FIXED, *(growth for growth in GROWTHS if growth.gamma))
    ]
    return Verdict(
        f"attention is n^C-sparse, C < 1: k_eps, the keys that hold {1 - MISSED:.0%} of the mass, "
        "grow like n^C",
        Outcome.of(not proportional, len(proportional) < len(GROWTHS)),
        f"{'; '.join(numbers)}; {SHARP.name}: {early} over shorter lengths, {late} over longer",
        _limit(proportional, "proportional to n, or drifting there, for "),
    )


def _entrywise(measured: Measured) -> Verdict:
    """Falls for every growth of R and every C, and is never above the bound 1 / (k + 1) < n^-C."""
    slopes = _of_powers(measured, ENTRY)
    bounded = all(
        bool((measured.of[ENTRY, growth.name, name] <= [n**-C for n in measured.lengths]).all())
        for growth in LOSS_GROWTHS
        for name, C in POWERS.items()
    )
    rising = [case for case, estimate in slopes.items() if estimate.high >= 0]
    return Verdict(
        "the largest n^C entries suffice with decreasing loss: entrywise, not renormalised",
        Outcome.of(bounded and not rising, bounded and len(rising) < len(slopes)),
        f"{'never' if bounded else 'at times'} above the bound n^-C; slopes at "
        f"{_listed(slopes, FIXED.name)}",
        _limit(rising, "does not fall for "),
    )


def _dropped_mass(measured: Measured) -> Verdict:
    """With a limit where it falls in half of the cases at least."""
    slopes = _of_powers(measured, MASS)
    falling = [case for case, estimate in slopes.items() if estimate.high < 0]
    cases = [f"{case}, slope {slopes[case]}" for case in falling]
    first, *_, last = measured.of[MASS, FIXED.name, "n^.5"].mean(0)
    return Verdict(
        "the largest n^C entries suffice with decreasing loss: dropped mass",
        Outcome.of(len(falling) == len(slopes), 2 * len(falling) >= len(slopes)),
        f"slopes at {_listed(slopes, FIXED.name)}; n^.5 drops {first:.2f} of the mass at n = "
        f"{measured.lengths[0]}, {last:.2f} at {measured.lengths[-1]}",
        _limit(cases, "falls only for "),
    )


def _output(measured: Measured) -> Verdict:
    """With a limit where it falls for all values but those that the scores depend on."""
    independent, linear = (_of_powers(measured, norm) for norm in (INDEPENDENT, LINEAR))
    rising = [case for case, estimate in independent.items() if estimate.high >= 0]
    rising_linear = [case for case, estimate in linear.items() if estimate.high >= 0]
    return Verdict(
        "the largest n^C entries suffice with decreasing loss: output, renormalised",
        Outcome.of(not rising and not rising_linear, not rising),
        f"slopes with independent values (k^-1/2 is -C/2) at {_listed(independent, FIXED.name)}; "
        f"with values linear in the tokens of the scores at {_listed(linear, FIXED.name)}",
        _limit(rising or rising_linear, "values independent of the scores; else no fall for "),
    )


def _log_floor(measured: Measured) -> Verdict:
    """By the worst of all n rows; with a limit where the mean over rows falls all the same."""
    worst = {name: measured.of[WORST, FIXED.name, name] for name in (*LOGS, "n^.5")}
    slopes = {name: log_slope(measured.lengths, values) for name, values in worst.items()}
    infeasible = slopes["n^.5"].high <= FALLS and all(
        slopes[name].low >= STEADY and worst[name][:, -1].mean() >= LARGE for name in LOGS
    )
    mean = {name: slope(measured, INDEPENDENT, FIXED.name, name) for name in LOGS}
    falling = [name for name, estimate in mean.items() if estimate.high < 0]
    at_last = ", ".join(f"{name} {values[:, -1].mean():.2f}" for name, values in worst.items())
    return Verdict(
        "o(log n)-sparse attention is infeasible: its error stays O(1)",
        Outcome.of(infeasible and not falling, infeasible),
        f"worst of n rows at n = {measured.lengths[-1]}, in values: {at_last} (slope "
        f"{slopes['n^.5']}); mean over rows, slopes {_listed(mean)}",
        _limit(falling, "of all n rows at once; the mean over rows falls slowly, for "),
    )


def _of_powers(measured: Measured, norm: str) -> dict[str, Estimate]:
    return {
        f"{growth.name}, {name}": slope(measured, norm, growth.name, name)
        for growth in LOSS_GROWTHS
        for name in POWERS
    }


def _limit(cases: Iterable[str], text: str) -> str:
    listed = "; ".join(cases)
    return f"{text}{listed}" if listed else ""


def _listed(estimates: dict[str, Estimate], only: str = "") -> str:
    return "; ".join(
        f"{name}: {estimate}" for name, estimate in estimates.items() if name.startswith(only)
    )
