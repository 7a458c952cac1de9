"""The figures of the study of windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.report import COLOURS
from lit_sparse.recipes.study.windows import persistence, synthetic, trained
from lit_sparse.recipes.study.windows.compare import READINGS, middle_cost
from lit_sparse.recipes.study.windows.cost import RULES
from lit_sparse.recipes.study.windows.persistence import Growth
from lit_sparse.recipes.study.windows.synthetic import REGIMES, Errors
from lit_sparse.recipes.study.windows.trained import Trained

_MARKERS = "os^Dv*"
_SHOWN = ("sigma 1", "sigma 2", "gamma 0.5")
"""Regimes of the figures."""


@dataclass(frozen=True)
class _Panel:
    """Errors [rules, x] over x."""

    x: Sequence[float]
    errors: np.ndarray


Line = tuple[str, list[_Panel]]
"""What a line of panels shows, and the panels."""


def synthetic_charts(found: Errors) -> list[Chart]:
    regimes = [i for i, regime in enumerate(REGIMES) if regime.name in _SHOWN]
    titles = [REGIMES[i].name.replace(" ", " = ") for i in regimes]
    middle = middle_cost(found.costs)
    over_costs: list[Line] = [
        (
            f"{norm}\n{_named(reading)}",
            [_Panel(found.costs, _over_lengths(found.of(norm, i), reading)) for i in regimes],
        )
        for norm in synthetic.NORMS[:2]
        for reading in READINGS
    ]
    over_lengths: list[Line] = [
        (norm, [_Panel(found.lengths, found.of(norm, i)[middle].mean(-1)) for i in regimes])
        for norm in synthetic.NORMS
    ]
    return [
        _chart(
            "synthetic_cost",
            "Synthetic rows: error against mean keys per query, for the mean of the document "
            "lengths and for the length that fares worst.",
            over_costs,
            titles,
            "mean keys per query",
        ),
        _chart(
            "synthetic_length",
            f"Synthetic rows: error by document length, all windows at {found.costs[middle]:.0f} "
            "mean keys.",
            over_lengths,
            titles,
            "document length, tokens",
        ),
    ]


def trained_charts(found: Sequence[Trained]) -> list[Chart]:
    over_costs: list[Line] = [
        (
            f"{model.name}\n{_named(reading)}",
            [_Panel(model.costs, _over_lengths(model.of(n), reading)) for n in trained.NORMS],
        )
        for model in found
        for reading in READINGS
    ]
    middle = middle_cost(found[0].costs)
    over_lengths: list[Line] = [
        (
            model.name,
            [_Panel(model.lengths, model.of(n)[middle].mean(-1)) for n in trained.NORMS],
        )
        for model in found
    ]
    return [
        _chart(
            "trained_cost",
            "Trained: error against executed keys per query, for the mean of the document lengths "
            "and for the length that fares worst. The loss difference is in nats per token.",
            over_costs,
            trained.NORMS,
            "executed keys per query",
        ),
        _chart(
            "trained_length",
            f"Trained: error by document length, all windows at {found[0].costs[middle]:.0f} "
            "executed keys.",
            over_lengths,
            trained.NORMS,
            "document length, tokens",
        ),
    ]


def growth_chart(found: Growth) -> Chart:
    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, contexts, values, what in (
            (left, found.contexts, found.one, "one row"),
            (right, found.all_contexts, found.largest, "largest of n rows"),
        ):
            for i, name in enumerate(persistence.WINDOWS):
                axes.plot(
                    contexts,
                    values[i].mean(0),
                    marker=_MARKERS[i],
                    color=COLOURS[i],
                    label=f"k ~ {name}",
                )
            _logarithmic(axes, contexts)
            axes.set(title=what, xlabel="context n, keys", yscale="log")
            axes.yaxis.set_minor_formatter("{x:.2g}")
        left.set_ylabel("output error ||o - o_S|| / rms ||v||")
        left.legend()

    return Chart(
        "slow_windows",
        f"Output error of windows that keep {persistence.KEYS} keys of {persistence.SHORTEST}, as "
        "the context grows.",
        draw,
    )


def _named(reading: str) -> str:
    return {"mean": "(mean of lengths)", "worst": "(worst length)"}[reading]


def _over_lengths(values: np.ndarray, reading: str) -> np.ndarray:
    """[costs, rules, lengths, rows] -> [rules, costs]"""
    return READINGS[reading](values.mean(-1), 2).T


def _chart(name: str, title: str, lines: list[Line], titles: Sequence[str], below: str) -> Chart:
    def draw(figure: Any) -> None:
        grid = figure.subplots(len(lines), len(titles), squeeze=False)
        for row, (label, panels) in zip(grid, lines, strict=True):
            for axes, panel in zip(row, panels, strict=True):
                _curves(axes, panel)
            row[0].set_ylabel(label)
        for axes, text in zip(grid[0], titles, strict=True):
            axes.set_title(text)
        for axes in grid[-1]:
            axes.set_xlabel(below)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(RULES))

    return Chart(name, title, draw, (1.0 + 3.6 * len(titles), 1.2 + 2.3 * len(lines)))


def _curves(axes: Any, panel: _Panel) -> None:
    for i, (rule, errors) in enumerate(zip(RULES, panel.errors, strict=True)):
        axes.plot(
            panel.x, errors, marker=_MARKERS[i], color=COLOURS[i], label=rule.name, markersize=4
        )
    _logarithmic(axes, panel.x)
    # A window that keeps all of a length errs by rounding alone; a loss may be less than dense.
    if panel.errors.min() > 1e-4 * panel.errors.max():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")


def _logarithmic(axes: Any, x: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{value:.0f}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
