"""Norm, largest logit and range by layer, of one model or of several in the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_sparse.recipes.inspect.measure import Findings
from lit_sparse.recipes.inspect.report import context

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, which colour-blind readers tell apart."""

MARKERS = "osD^vP"


def plot(findings: Sequence[Findings], path: Path) -> None:
    """Write the figure; the ending of the path decides the format (PNG, PDF, SVG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    norms, logits, ranges = figure.subplots(1, 3)
    for i, found in enumerate(findings):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        name = found.model.name if len(findings) == 1 else f"[{i + 1}] {found.model.name}"
        own = found.layers
        _band(norms, [layer.norms.weight[:, 0].cpu() for layer in own], style, name)
        _band(logits, [layer.largest for layer in own], style, f"{name}, measured")
        for part, dashes in (("bound", "--"), ("estimate", ":")):
            middle = [getattr(layer, part).median().item() for layer in own]
            if middle[0] == middle[0]:  # with QK-norm there is no estimate
                logits.plot(_numbers(found), middle, dashes, color=style["color"], label=part)
        _band(ranges, [layer.range for layer in own], style, name)
    _required(ranges, findings)
    titles = (
        (norms, "R / B²: norm of $W_Q W_K^T$ / √head_dim", "norm"),
        (logits, "Largest logit", "nats"),
        (ranges, "Range of logits, median row", "nats"),
    )
    for axes, title, unit in titles:
        axes.set(title=title, xlabel="layer", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    logits.set_yscale("log")
    for axes in (norms, ranges):
        axes.set_ylim(bottom=0)
    figure.suptitle("Logits by layer: line the median head, band all heads", fontsize=11)
    figure.savefig(path)


def _band(axes: Any, heads: list[Tensor], style: dict[str, str], label: str) -> None:
    """The median of each layer's heads, and from their least to their largest."""
    layers = range(len(heads))
    axes.plot(layers, [x.median().item() for x in heads], ms=4, label=label, **style)
    low, high = ([f(x).item() for x in heads] for f in (Tensor.amin, Tensor.amax))
    axes.fill_between(layers, low, high, color=style["color"], alpha=0.18, lw=0)


def _numbers(found: Findings) -> list[int]:
    return [layer.layer for layer in found.layers]


def _required(axes: Any, findings: Sequence[Findings]) -> None:
    """Lines of the ranges that the budgets require, where all layers of all models agree."""
    required = [
        (found.lengths, layer.required.tolist()) for found in findings for layer in found.layers
    ]
    if any(one != required[0] for one in required):
        return
    for n, nats in zip(*required[0], strict=True):
        axes.axhline(nats, color="0.35", lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            f"required at {context(n)}",
            (1, nats),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 2),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color="0.25",
        )
