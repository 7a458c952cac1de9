"""The two figures of a calibration: keys against context, and the exponents of all heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark.report import named_layers
from lit_sparse.recipes.calibrate.report import Result

LAW, EXPONENTS = "k_of_n.png", "exponents.png"

# Okabe and Ito's colours, which the colour-blind tell apart; with more layers a scale of one hue.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHAPES = "osD^vP"

_MARKS = {"power": "", "constant": "c", "proportional": "=", "no power law": "x"}


def plot_law(path: Path, result: Result) -> None:
    """Keys against context, log-log: needs, fits with bands, the law, the check."""
    fits, chosen, check = result.fits, result.chosen, result.check
    layers = len(fits.exponent)
    figure = Figure(figsize=(8.5, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    colours, few = _layer_colours(layers)
    shortest = fits.shortest
    n = torch.logspace(np.log10(shortest), np.log10(check.length), 60, dtype=torch.float64)
    last = int((n <= fits.longest).sum())

    axes.plot(n, n, color="0.6", lw=1, zorder=1, label="every key (k = n)")
    fit, low, high = (_most_heads(x) for x in (fits.keys_at(n), *fits.band_at(n)))
    for i, layer in enumerate(fits.layers):
        colour = colours[i]
        dense = chosen.of(layer) == Budget.dense()
        label = f"layer {layer}" + (", stays dense" if dense else "") if few else None
        x, y = _points(result, i)
        axes.plot(x, y, _SHAPES[i] if few else ".", color=colour, ms=6, zorder=4, label=label)
        axes.plot(n[:last], fit[:last, i], "-", color=colour, lw=1.3, zorder=3)
        axes.plot(n[last - 1 :], fit[last - 1 :, i], ":", color=colour, lw=1.3, zorder=3)
        if few:
            axes.fill_between(n, low[:, i], high[:, i], color=colour, alpha=0.13, lw=0)
    if not few:
        scale = _scale(fits.layers[-1] + 1)
        figure.colorbar(scale, ax=axes, label="layer", fraction=0.04, pad=0.02)
    _draw_laws(axes, result, n)
    axes.axvline(fits.longest, color="0.75", lw=0.8, zorder=0)
    axes.axvline(check.length, color="0.75", lw=0.8, zorder=0)
    ticks = [*result.settings["lengths"], check.length]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(shortest * 0.93, check.length * 1.13)
    axes.grid(True, which="major", alpha=0.25)
    axes.set_xlabel("context n (tokens)")
    axes.set_ylabel("keys (tokens)")
    mass, share = 100 * (1 - fits.missed), 100 * fits.quantile
    axes.set_title(
        f"Keys that hold {mass:g} % of the mass that is not always kept: enough for {share:g} % of "
        "the rows of 90 % of the heads\n"
        f"points: measured; lines: fits{' with 95 % bands' if few else ''}, dotted beyond what was "
        "measured",
        fontsize=10,
    )
    axes.legend(fontsize=8.5, loc="upper left", framealpha=0.9)
    figure.savefig(path)


def _draw_laws(axes: Any, result: Result, n: Tensor) -> None:
    """The laws of sparse layers in black, that of most layers thick; the check as stars."""
    drawn = result.budgets
    drawn.pop(Budget.dense(), None)
    by_layers = sorted(drawn, key=lambda budget: -len(drawn[budget]))
    context = n.round().long()

    def draw(budget: Budget, style: str, width: float, label: str | None) -> None:
        axes.plot(context, budget(context), style, color="black", lw=width, zorder=5, label=label)

    check = result.check
    last = check.final
    if last is None:
        return
    first, *others = by_layers
    draw(first, "-", 2.2, f"{_formula(first)}: law of {named_layers(drawn[first])}")
    for i, budget in enumerate(others):
        count = sum(len(drawn[other]) for other in others)
        said = "1 layer that needs" if count == 1 else f"{count} layers that need"
        draw(budget, "-", 0.8, None if i else f"laws of {said} more")
    if last.factor != 1:
        before = result.fitted.of(drawn[first][0])
        draw(before, "--", 1.0, f"{_formula(before)}: as fitted, before the check")
    said = "met" if check.met else "MISSED"
    keys = [budget(check.length) for budget in by_layers]
    axes.plot(
        [check.length] * len(keys), keys, "*", ms=15, zorder=6,
        color="#F0E442" if check.met else "#D55E00", markeredgecolor="black", ls="none",
        label=f"check at twice the length: missed mass p95 {last.missed_p95:.3f}, "
        f"{check.target:g} allowed: {said}",
    )  # fmt: skip


def _formula(budget: Budget) -> str:
    return f"k = {budget.alpha:.3g} n$^{{{budget.exponent:g}}}$"


def plot_exponents(path: Path, result: Result) -> None:
    """C of every layer and head with the verdicts, and how well it is known."""
    fits = result.fits
    layers, heads = fits.exponent.shape
    width, height = 2.6 + 2 * max(2.4, 0.36 * min(heads, 16)), 1.7 + min(max(1.6, 0.3 * layers), 6)
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    marks = [[_MARKS[verdict] for verdict in layer] for layer in fits.verdict]
    spread = fits.exponent_high - fits.exponent_low
    _heat_map(figure, left, fits.exponent, fits.layers, "exponent C", 1.0, marks)
    _heat_map(figure, right, spread, fits.layers, "width of its 95 % interval", 0.5, None)
    figure.suptitle("Need k(n) = alpha n$^C$ of every head", fontsize=11)
    figure.supxlabel(
        "= proportional to n     x no power law fits     c constant     no mark: power law",
        fontsize=8.5,
    )
    figure.savefig(path)


def _heat_map(
    figure: Figure,
    axes: Any,
    values: Tensor,
    numbers_of: Sequence[int],
    title: str,
    most: float,
    marks: list[list[str]] | None,
) -> None:
    """[layers, heads] on the fixed scale from 0 to `most`, with values where there is room."""
    layers, heads = values.shape
    image = axes.imshow(values.numpy(), aspect="auto", vmin=0, vmax=most, cmap="viridis")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_xticks(range(0, heads, max(1, heads // 8)))
    ticks = range(0, layers, max(1, layers // 8))
    axes.set_yticks(ticks, [str(numbers_of[i]) for i in ticks])
    axes.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).ax.tick_params(labelsize=8)
    numbers = layers * heads <= 96
    for (layer, head), value in np.ndenumerate(values.numpy()):
        mark = "" if marks is None else marks[layer][head]
        text = f"{value:.2f} {mark}".strip() if numbers else mark
        colour = "black" if value > 0.6 * most else "white"
        axes.text(head, layer, text, ha="center", va="center", fontsize=7, color=colour)


def _points(result: Result, place: int) -> tuple[list[float], list[float]]:
    """Of each length: mean context, and what the fitted quantile of rows needs there in 90 % of
    the heads of the layer at that place; rows are moved to the mean context along their head's law.
    """
    fits, x, y = result.fits, [], []
    for rows in result.rows.values():
        context = result.needs.context[rows].double()
        needs = getattr(result.needs, fits.which)[rows, place].double()
        needs *= (context.mean() / context)[:, None] ** fits.exponent[place]
        x.append(float(context.mean()))
        y.append(float(_most_heads(torch.quantile(needs, fits.quantile, dim=0))))
    return x, y


def _most_heads(keys: Tensor) -> Tensor:
    """[..., heads] -> [...], what is enough for 90 % of the heads."""
    return torch.quantile(keys, 0.9, dim=-1)


def _scale(layers: int) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, layers - 1), "viridis")


def _layer_colours(layers: int) -> tuple[list[Any], bool]:
    """A colour for each layer, and whether they are few enough for a legend."""
    if layers <= len(_COLOURS):
        return list(_COLOURS[:layers]), True
    scale = _scale(layers)
    return [scale.to_rgba(layer) for layer in range(layers)], False
