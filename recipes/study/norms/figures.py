"""Figures of the study: the phase diagram, exponents by gamma, growing norms."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_sparse import theory
from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.norms.measure import (
    FEW,
    FEW_HOLD,
    GAMMAS,
    GROWTHS,
    ONE_HOLDS,
    Measured,
)
from lit_sparse.recipes.study.norms.verdicts import threshold
from lit_sparse.recipes.study.report import COLOURS
from lit_sparse.recipes.study.stats import log_slope


def all_of(measured: Measured) -> list[Chart]:
    return [
        Chart(
            "phases",
            f"Share of a row's mass on its {FEW} largest keys and on its largest. Dashed: gamma = "
            "1. Points: half of the rows have half of their mass there, with the 95 % interval.",
            lambda figure: _phases(figure, measured),
        ),
        Chart(
            "gammas",
            "Left: gamma read off the entropy against gamma. Right: exponent C of exp(entropy) "
            "with its 95 % interval. Dashed: the random-energy model at leading order.",
            lambda figure: _gammas(figure, measured),
        ),
        Chart(
            "growths",
            f"How R grows decides: effective support, and share of rows where {FEW} keys have "
            "half of the mass.",
            lambda figure: _growths(figure, measured),
        ),
    ]


def _phases(figure: Any, measured: Measured) -> None:
    lengths, few, one = np.array(measured.lengths), f"mass of {FEW} keys", "max weight"
    critical = np.array([float(theory.collapse_sigma(n)) for n in lengths])
    n, sigma = np.meshgrid(lengths, np.sqrt(GAMMAS))
    sigma = sigma * critical
    for axes, name, criterion, title in zip(
        figure.subplots(1, 2, sharey=True),
        (few, one),
        (FEW_HOLD, ONE_HOLDS),
        (f"Mass of {FEW} keys", "Largest weight"),
        strict=True,
    ):
        mass = measured.at_gamma[name].mean(0).T
        mesh = axes.pcolormesh(
            n, sigma, mass, shading="gouraud", cmap="viridis", vmin=0, vmax=1, rasterized=True
        )
        axes.plot(lengths, critical, "--", color="white", label="gamma = 1: sqrt(2 ln n)")
        found = [threshold(measured, place, criterion) for place in range(len(lengths))]
        middle = [e.mean**0.5 * s for e, s in zip(found, critical, strict=True)]
        errors = [
            [m - e.low**0.5 * s for e, m, s in zip(found, middle, critical, strict=True)],
            [e.high**0.5 * s - m for e, m, s in zip(found, middle, critical, strict=True)],
        ]
        axes.errorbar(
            lengths,
            middle,
            errors,
            fmt="o",
            ms=5,
            color=COLOURS[5],
            mec="white",
            clip_on=False,
            zorder=5,
            label="half of the rows",
        )
        axes.set(title=title, xlabel="n, keys", xlim=(lengths[0], lengths[-1]))
        axes.set_ylim(sigma[0, -1], sigma[-1, 0])
        axes.set_xscale("log", base=2)
    figure.axes[0].set_ylabel("sigma of the logits, nats")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    legend.get_frame().set_facecolor("0.75")
    figure.colorbar(mesh, ax=figure.axes, label="share of the mass")


def _gammas(figure: Any, measured: Measured) -> None:
    left, right = figure.subplots(1, 2)
    lengths, places = measured.lengths, np.linspace(0, len(measured.lengths) - 1, 4).astype(int)
    for place, colour in zip(places, COLOURS, strict=False):
        entropy = 1 - measured.at_gamma["entropy ratio"][:, place].mean(0)
        left.plot(GAMMAS, entropy, "o-", ms=3, color=colour, label=f"n = {lengths[place]}")
    left.plot(GAMMAS, np.minimum(GAMMAS, 1), "--", color="0.3", label="min(1, gamma)")
    left.set(ylabel="1 - H / ln n", title="gamma of the entropy")
    left.legend(fontsize=9)
    support = measured.at_gamma["support"]
    slopes = [log_slope(lengths, support[:, :, place]) for place in range(len(GAMMAS))]
    right.plot(GAMMAS, [e.mean for e in slopes], "o-", ms=3, color=COLOURS[0], label="measured")
    low, high = [e.low for e in slopes], [e.high for e in slopes]
    right.fill_between(GAMMAS, low, high, color=COLOURS[0], alpha=0.2, lw=0)
    expected = [float(theory.rem_exponent(gamma)) for gamma in GAMMAS]
    right.plot(GAMMAS, expected, "--", color="0.3", label="max(0, 1 - gamma)")
    right.set(ylabel="d ln exp(H) / d ln n", title="Exponent C of the effective support")
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("gamma = sigma² / (2 ln n)")
        axes.grid(alpha=0.25)


def _growths(figure: Any, measured: Measured) -> None:
    left, right = figure.subplots(1, 2)
    for growth, colour in zip(GROWTHS, COLOURS, strict=False):
        for axes, name in ((left, "support"), (right, FEW_HOLD)):
            values = measured.of[name, growth.name].mean(0)
            label = growth.name if axes is left else None
            axes.plot(measured.lengths, values, "o-", ms=3, color=colour, label=label)
    left.set(ylabel="exp(entropy), keys", yscale="log", title="Effective support")
    right.set(ylabel="share of rows", ylim=(-0.02, 1.02), title=f"{FEW} keys have half")
    for axes in (left, right):
        axes.set_xlabel("n, keys")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
