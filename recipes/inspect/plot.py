"""Norm, largest logit and range by layer, of one model or of several in the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_sparse.recipes.benchmark.report import tokens
from lit_sparse.recipes.inspect.measure import Findings
from lit_sparse.recipes.inspect.report import label

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's, which colour-blind readers tell apart."""

MARKERS = "osD^vP"


def plot(findings: Sequence[Findings], path: Path) -> None:
    """Write the figure; the ending of the path decides the format (PNG, PDF, SVG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    norms, logits, ranges = figure.subplots(1, 3)
    key = []
    for i, found in enumerate(findings):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "ms": 4,
        }
        key.append(Line2D([], [], **style, label=label(found)))
        _band(norms, [layer.norms.weight[:, 0] for layer in found.layers], style)
        _band(logits, [layer.largest for layer in found.layers], style)
        _band(ranges, [layer.range for layer in found.layers], style)
        for part, dashes in (("bound", "--"), ("estimate", ":")):
            # With QK-norm the estimate is NaN, which is not drawn.
            middle = [getattr(layer, part).median().item() for layer in found.layers]
            logits.plot(range(len(middle)), middle, dashes, color=style["color"])
    key += [
        Line2D([], [], color="0.3", ls="--", label="predicted bound"),
        Line2D([], [], color="0.3", ls=":", label="estimate of the RMS"),
    ]
    if _required(ranges, findings):
        key.append(Line2D([], [], color="0.3", ls="-.", lw=0.9, label="range required at 8k, ..."))
    titles = (
        (norms, "R / B²: norm of $W_Q W_K^T$ / √head_dim", "norm"),
        (logits, "Largest logit", "nats"),
        (ranges, "Range of logits in the median row", "nats"),
    )
    for axes, title, unit in titles:
        axes.set(title=title, xlabel="layer", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    logits.set_yscale("log")
    for axes in (norms, ranges):
        axes.set_ylim(bottom=0)
    figure.suptitle("Logits by layer. Line: median head; band: all heads", fontsize=11)
    figure.legend(handles=key, loc="outside lower center", ncols=min(len(key), 5), fontsize=9)
    figure.savefig(path)


def _band(axes: Any, heads: list[Tensor], style: dict[str, Any]) -> None:
    """The median of each layer's heads, and from their least to their largest."""
    layers = range(len(heads))
    axes.plot(layers, [x.median().item() for x in heads], **style)
    low, high = ([f(x).item() for x in heads] for f in (Tensor.amin, Tensor.amax))
    axes.fill_between(layers, low, high, color=style["color"], alpha=0.18, lw=0)


def _required(axes: Any, findings: Sequence[Findings]) -> bool:
    """Lines of the ranges that the budgets require; False where layers or models differ in it."""
    required = [(found.lengths, x.required.tolist()) for found in findings for x in found.layers]
    if any(one != required[0] for one in required):
        return False
    for i, (n, nats) in enumerate(zip(*required[0], strict=True)):
        axes.axhline(nats, color="0.3", lw=0.9, ls="-.")
        # Side by side: the lines lie close to each other.
        place, across = (0.98 - 0.1 * i, nats), ("axes fraction", "data")
        box = {"fc": "white", "ec": "none", "pad": 0.5}
        axes.annotate(
            tokens(n), place, xycoords=across, ha="right", va="center", fontsize=7, bbox=box
        )
    return True
