"""The figure of the study: how fast predictions degrade."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.report import COLOURS
from lit_sparse.recipes.study.sensitivity.measure import FAMILIES, PREDICTIONS, Measured
from lit_sparse.recipes.study.sensitivity.verdicts import BOUNDED, HOLDS

_CLIP = 0.1, 10.0


def all_of(measured: Measured) -> list[Chart]:
    return [
        Chart(
            "degradation",
            "Measured / predicted as an assumption is relaxed, from left (it holds) to right, with "
            "95 % intervals; shaded: the prediction holds. What lies beyond the axes, or is not "
            "positive, is drawn at their edge.",
            lambda figure: _degradation(figure, measured),
            (13, 7),
        )
    ]


def _degradation(figure: Any, measured: Measured) -> None:
    families = [family for family in FAMILIES if family != BOUNDED]
    grid = figure.subplots(2, 3, sharey=True)
    for axes, family in zip(grid.flat, families, strict=True):
        cases = [measured.base, *(case for case in measured.cases if case.family == family)]
        axes.axhspan(*HOLDS, color="0.9")
        for name, colour, marker in zip(PREDICTIONS, COLOURS, "os^Dv", strict=False):
            found = np.array([[r.mean, r.low, r.high] for r in (c.ratios[name] for c in cases)])
            mean, low, high = np.clip(found.T, *_CLIP)
            label = name if axes is grid[0, 0] else None
            axes.plot(range(len(cases)), mean, marker=marker, ms=5, color=colour, label=label)
            axes.fill_between(range(len(cases)), low, high, color=colour, alpha=0.15, lw=0)
        axes.set(yscale="log", ylim=(0.9 * _CLIP[0], 1.1 * _CLIP[1]), title=family)
        axes.set_xticks(range(len(cases)), ["none", *(case.level for case in cases[1:])])
        axes.set_yticks((0.1, 0.2, 0.5, 1, 2, 5, 10), ("≤ 0.1", ".2", ".5", "1", "2", "5", "≥ 10"))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    for row in grid:
        row[0].set_ylabel("measured / predicted")
    figure.legend(loc="outside lower center", ncols=len(PREDICTIONS), fontsize=10)
