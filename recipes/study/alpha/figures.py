"""The figure of the study `alpha`: loss against executed keys."""

from __future__ import annotations

from typing import Any

from lit_sparse.recipes.study.alpha.measure import TEXT, Measured
from lit_sparse.recipes.study.report import COLOURS

_OTHERS = {"calibrated": ("*", 13), "preset": ("x", 7)}
"""Marker and size."""


def draw_losses(measured: Measured, figure: Any) -> None:
    """A panel for text and each task."""
    exponents = sorted({measured.laws[i].exponent for i in measured.of_kind("grid")})
    (line,) = figure.subplots(1, len(measured.losses), squeeze=False)
    for axes, losses in zip(line, measured.losses, strict=True):
        error = losses.loss.mean(1)
        for colour, exponent in zip(COLOURS, exponents, strict=False):
            same = [i for i in measured.of_kind("grid") if measured.laws[i].exponent == exponent]
            same = sorted(same, key=losses.keys.__getitem__)
            label = f"C = {exponent:g}"
            axes.plot(losses.keys[same], error[same], marker=".", color=colour, label=label)
        for kind, (marker, size) in _OTHERS.items():
            own = measured.of_kind(kind)
            axes.plot(
                losses.keys[own],
                error[own],
                linestyle="",
                marker=marker,
                markersize=size,
                color="black",
                markerfacecolor="white" if marker == "*" else "black",
                label=kind,
            )
        answered = "" if losses.name == TEXT else f", dense: {losses.dense_right:.0%} answered"
        axes.set(title=f"{losses.name}{answered}", xlabel="executed keys per query", xscale="log")
        ticks = [2.0**i for i in range(12) if losses.keys.min() <= 2**i <= losses.keys.max()]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    line[0].set_ylabel("loss - dense loss, nats per token")
    handles, labels = line[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
