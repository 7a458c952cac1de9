"""What the numbers say of the claims about windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.stats import Estimate, log_slope
from lit_sparse.recipes.study.windows import persistence, synthetic, trained
from lit_sparse.recipes.study.windows.compare import compare, keys_ratio, middle_cost
from lit_sparse.recipes.study.windows.cost import ADAPTIVE, RULES
from lit_sparse.recipes.study.windows.persistence import Growth
from lit_sparse.recipes.study.windows.synthetic import REGIMES, Errors
from lit_sparse.recipes.study.windows.trained import Trained

_ADAPTIVE = RULES.index(ADAPTIVE)
_STEP = 0.25
"""Between the exponents of `RULES`: a best one is known to no better."""

_FALLS = -0.1
"""A slope of ln error over ln n above it is an error that persists: a context ten times as long
takes a fifth off it at most."""


def on_synthetic_rows(found: Errors, norm: str, seed: int) -> Verdict:
    """Adaptive against constant, over all regimes of the logits."""
    cases = {regime.name: (found.of(norm, i), found.costs) for i, regime in enumerate(REGIMES)}
    lengths = f"{found.lengths[0]} to {found.lengths[-1]} tokens"
    return _adaptive(f"synthetic rows of {lengths}, ideal keys, {norm}", cases, seed)


def on_models(found: Sequence[Trained], norm: str, seed: int) -> Verdict:
    """The same over trained models."""
    cases = {model.name: (model.of(norm), model.costs) for model in found}
    lengths = f"{found[0].lengths[0]} to {found[0].lengths[-1]} tokens"
    return _adaptive(f"trained, documents of {lengths}, {norm}", cases, seed)


def _adaptive(
    what: str, cases: Mapping[str, tuple[np.ndarray, tuple[float, ...]]], seed: int
) -> Verdict:
    """A case has errors [costs, rules, lengths, rows], and its costs. With a limit where the
    adaptive window wins more cases than it loses, for the worst length or in the mean.
    """
    total = sum(len(costs) for _, costs in cases.values())
    parts: list[str] = []
    limits: list[str] = []
    wins: list[int] = []
    ahead = False
    for reading, of in (("worst", "the length that fares worst"), ("mean", "the mean of lengths")):
        won, lost, ratios = 0, 0, []
        worse: list[str] = []
        for name, (values, costs) in cases.items():
            found = compare(values, reading, seed)
            won += int(found.won[:, _ADAPTIVE].sum())
            where = np.array(costs)[found.lost[:, _ADAPTIVE]]
            lost += len(where)
            if len(where):
                worse.append(f"{name} ({', '.join(f'{cost:.0f}' for cost in where)} keys)")
            middle = middle_cost(costs)
            ratios.append(keys_ratio(values, costs, middle, _ADAPTIVE, reading, seed))
        wins.append(won)
        ahead |= won > lost
        if worse:
            limits.append(f"a constant window errs less in {of} for {', '.join(worse)}")
        most = costs[-1] / costs[middle]
        parts.append(
            f"{of}: less error beyond chance in {won} of {total} cases, more in {lost}; for "
            f"the error of {costs[middle]:.0f} adaptive keys a constant window takes "
            f"{_ratios(ratios)} times as many (more than {most:.2g} was not tried)"
        )
    outcome = Outcome.of(all(won == total for won in wins), ahead)
    return Verdict(
        "On mixed lengths the window alpha n^.5 errs less than a constant one of equal mean cost "
        f"({what}).",
        outcome,
        "; ".join(parts) + ".",
        _limit(outcome, limits),
    )


def _limit(outcome: Outcome, limits: Sequence[str]) -> str:
    if outcome is Outcome.SUPPORTED:
        return ""
    text = "; ".join(limits) or "not beyond chance everywhere"
    return f"{text[0].upper()}{text[1:]}."


def best_exponent(found: Errors) -> Verdict:
    """Whether the exponent of the need wins, for the worst length and in the mean."""
    powers = [i for i, rule in enumerate(RULES) if rule.exponent is not None]
    exponents = np.array([RULES[i].exponent for i in powers], dtype=float)
    near, below, total = 0, 0, 0
    for number, regime in enumerate(REGIMES):
        errors = found.of("missed mass", number).mean(-1)[:, powers]
        worst, mean = exponents[errors.max(-1).argmin(1)], exponents[errors.mean(-1).argmin(1)]
        near += int((abs(worst - regime.exponent) <= _STEP).sum())
        below += int((mean < worst).sum())
        total += len(worst)
    outcome = Outcome.of(near == total and not below, near > total / 2)
    limit = (
        f"of the exponents tried, 0 to 1 by {_STEP:g}; for the mean of lengths a lower one is best "
        f"in {below} of {total} cases: a key is worth more to a row that sees few"
    )
    return Verdict(
        "The exponent whose worst length misses least mass is that of the need: 1 where sigma is "
        "fixed, 1 - gamma where sigma^2 = 2 gamma ln n.",
        outcome,
        f"within {_STEP:g} of it in {near} of {total} cases (sharpness, cost).",
        _limit(outcome, [limit]),
    )


def slow_windows(found: Growth, seed: int) -> Verdict:
    """Whether the error of a window of o(log n) keys persists."""
    one, largest = (
        {name: log_slope(contexts, values[i], seed) for i, name in enumerate(persistence.WINDOWS)}
        for contexts, values in (
            (found.contexts, found.one),
            (found.all_contexts, found.largest),
        )
    )
    slow, slower = "sqrt(log n)", "log n"
    persist = [all(s[name].low > _FALLS for s in (one, largest)) for name in (slow, slower)]
    falls = all(s["n^.5"].high < _FALLS for s in (one, largest))
    shrinks = [name for name in (slow, slower) if one[name].high < 0]
    numbers = "; ".join(
        f"{name} {one[name]}, largest of n rows {largest[name]}" for name in persistence.WINDOWS
    )
    outcome = Outcome.of(all(persist) and falls and not shrinks, persist[0] and falls)
    limit = (
        f"One row's error shrinks with {' and '.join(shrinks)} keys too, but more slowly than with "
        "any power of n that was tried"
    )
    return Verdict(
        "A window of o(log n) keys, or of log n, has a persistent error (output, renormalised, "
        f"values independent of scores, sigma {persistence.SIGMA:g}); one of n^.5 keys has not.",
        outcome,
        f"slope of ln error over ln n, {found.contexts[0]} to {found.contexts[-1]} keys (largest: "
        f"to {found.all_contexts[-1]}), 95 % interval: {numbers}.",
        _limit(outcome, [limit] if shrinks else []),
    )


def all_verdicts(
    rows: Errors, growth: Growth, models: Sequence[Trained], seed: int
) -> list[Verdict]:
    return [
        *(on_synthetic_rows(rows, norm, seed) for norm in synthetic.NORMS),
        *(on_models(models, norm, seed) for norm in trained.NORMS),
        best_exponent(rows),
        slow_windows(growth, seed),
    ]


def _ratios(ratios: Sequence[Estimate]) -> str:
    if len(ratios) == 1:
        return str(ratios[0])
    means = [ratio.mean for ratio in ratios]
    return f"{min(means):.2g} to {max(means):.2g}"
