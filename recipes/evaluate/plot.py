"""Retrieval by depth and length as heat maps, and the loss by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_sparse.evaluation import DENSE, SPARSE, mean_of
from lit_sparse.evaluation.figure import draw_answers
from lit_sparse.recipes.benchmark.report import tokens
from lit_sparse.recipes.evaluate.report import Result
from lit_sparse.recipes.inspect.plot import COLOURS, MARKERS


def plot(results: Sequence[Result], path: Path) -> None:
    """Write the figure; the ending of the path decides the format (PNG, PDF, SVG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_losses = any(result.found.losses for result in results)
    asked = [result for result in results if result.found.answers]
    heights = [3.6] * with_losses + [0.6 + 2.1 * len(result.sides) for result in asked]
    widest = max((len(result.found.answers) for result in asked), default=1)
    width = max(2.6 * widest + 1.4, 8)
    figure = Figure(figsize=(width, max(sum(heights), 2)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    if heights:
        rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
        parts = list(rows[:, 0])
        if with_losses:
            _draw_losses(parts.pop(0), results)
        for part, result in zip(parts, asked, strict=True):
            draw_answers(part, result.found.answers, result.subject.name)
    figure.savefig(path)


def _draw_losses(figure: Any, results: Sequence[Result]) -> None:
    """Left: the loss by position in the longest texts; right: what sparse adds to it."""
    compared = any(SPARSE in result.sides for result in results)
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    edges: set[int] = set()
    for i, result in enumerate(results):
        if not result.found.losses:
            continue
        _, sides = max(result.found.losses.items())
        parts = next(iter(sides.values())).parts
        edges |= {end for _, end in parts}
        # The middle of a range on the logarithmic axis; the first one begins at 0.
        x = [end / 2**0.5 for _, end in parts]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "ms": 5}
        name = f"{result.subject.name}, " if len(results) > 1 else ""
        losses = {s: [found.of_texts(*part) for part in parts] for s, found in sides.items()}
        for side, values in losses.items():
            dashes = "--" if side == DENSE and SPARSE in losses else "-"
            means = [found.mean() for found in values]
            axes[0].plot(x, means, dashes, **style, label=f"{name}{side}")
        if SPARSE in losses:
            pairs = zip(losses[SPARSE], losses[DENSE], strict=True)
            gaps = [mean_of(sparse - dense) for sparse, dense in pairs]
            axes[1].plot(x, [gap.mean for gap in gaps], "-", **style)
            low, high = [gap.low for gap in gaps], [gap.high for gap in gaps]
            axes[1].fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
    titles = ("Loss by position", "Sparse - dense, with 95 % intervals over documents")
    ticks = sorted(edges)
    for one, title in zip(axes, titles, strict=False):
        one.set_xscale("log", base=2)
        one.set_xticks(ticks, [tokens(n) for n in ticks])
        one.minorticks_off()
        one.set(xlim=(ticks[0] / 2, ticks[-1]), xlabel="position, tokens", ylabel="nats per token")
        one.set_title(title, fontsize=10)
        one.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    if compared:
        axes[1].axhline(0, color="0.4", lw=0.8)
