"""Figures of the study: keys needed against n, losses against n."""

from __future__ import annotations

from typing import Any

from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.report import COLOURS
from lit_sparse.recipes.study.sparsity.measure import (
    BUDGETS,
    FIXED,
    GROWTHS,
    HALF,
    MASS,
    MISSED,
    NORMS,
    WORST,
    WORST_BUDGETS,
    Measured,
)
from lit_sparse.recipes.study.stats import log_slope, mean_of


def all_of(measured: Measured) -> list[Chart]:
    return [
        Chart(
            "keys",
            f"Left: keys that hold {1 - MISSED:.0%} of a row's mass; dashed: Gaussian logits of "
            "the same standard deviation. Right: local exponent of each doubling of n, with its "
            "95 % interval.",
            lambda figure: _keys(figure, measured),
        ),
        Chart(
            "losses",
            f"Losses of the k largest weights against n, {FIXED.name} above, {HALF.name} below.",
            lambda figure: _losses(figure, measured),
            (14, 7),
        ),
        Chart(
            "worst_rows",
            f"{FIXED.name}: the largest error of an output entry over n rows, in units of a value; "
            "k of order ln n leaves O(1).",
            lambda figure: _worst(figure, measured),
            (6, 4),
        ),
    ]


def _keys(figure: Any, measured: Measured) -> None:
    left, right = figure.subplots(1, 2)
    n = measured.lengths
    for growth, colour in zip(GROWTHS, COLOURS, strict=True):
        keys = measured.of["keys", growth.name]
        left.plot(n, keys.mean(0), "o-", ms=3, color=colour, label=growth.name)
        left.plot(n, measured.of["gaussian", growth.name].mean(0), "--", lw=0.9, color=colour)
        middles = [(n[i] * n[i + 1]) ** 0.5 for i in range(len(n) - 1)]
        local = [log_slope(n[i : i + 2], keys[:, i : i + 2]) for i in range(len(n) - 1)]
        right.plot(middles, [e.mean for e in local], "o-", ms=3, color=colour)
        low, high = [e.low for e in local], [e.high for e in local]
        right.fill_between(middles, low, high, color=colour, alpha=0.15, lw=0)
    left.set(ylabel="k_eps, keys", yscale="log", title="Keys needed")
    right.set(ylabel="d ln k_eps / d ln n", title="Local exponent C")
    right.axhline(1, color="0.3", lw=0.8, ls=":")
    for axes in (left, right):
        _lengths(axes)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)


def _losses(figure: Any, measured: Measured) -> None:
    grid = figure.subplots(2, len(NORMS), sharex=True, sharey="col")
    for row, growth in zip(grid, (FIXED, HALF), strict=True):
        for axes, norm in zip(row, NORMS, strict=True):
            for budget, colour in zip(BUDGETS, COLOURS, strict=True):
                loss = measured.of[norm, growth.name, budget].mean(0)
                label = f"k = {budget}" if axes is grid[0, 0] else None
                axes.plot(measured.lengths, loss, "o-", ms=3, color=colour, label=label)
            scale = {"ylim": (0, 1.03)} if norm == MASS else {"yscale": "log"}
            axes.set(title=f"{norm}\n{growth.name}", **scale)
            axes.title.set_fontsize(10)
            _lengths(axes)
    figure.legend(loc="outside lower center", ncols=len(BUDGETS), fontsize=9)


def _worst(figure: Any, measured: Measured) -> None:
    axes = figure.subplots()
    # The first ones lie on each other: markers of falling size show all.
    for budget, colour, size in zip(WORST_BUDGETS, COLOURS, (8, 5, 3, 3), strict=False):
        found = [mean_of(values) for values in measured.of[WORST, FIXED.name, budget].T]
        means = [estimate.mean for estimate in found]
        axes.plot(measured.lengths, means, "o-", ms=size, color=colour, label=budget)
        low, high = [e.low for e in found], [e.high for e in found]
        axes.fill_between(measured.lengths, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(ylabel="worst error", ylim=(0, 1.05), title="Worst of n rows")
    _lengths(axes)
    axes.legend(title="k", fontsize=9)


def _lengths(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("n, keys")
    axes.grid(alpha=0.25)
