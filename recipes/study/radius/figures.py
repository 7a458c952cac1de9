"""Figures of R: what it predicts, B by layer, and what RoPE rules do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.radius.measure import Radii
from lit_sparse.recipes.study.radius.rope import NONE, OWN, Rotated
from lit_sparse.recipes.study.report import COLOURS

MARKS = "osD^vP"


def all_of(found: Sequence[Radii], rotated: Sequence[Rotated]) -> list[Chart]:
    charts = [
        Chart(
            "predictions",
            "Every head on Python source: its logits' spread and the keys that it needs against R "
            "(root mean square for B), its largest logit against the bound. Grey: equal; dashed: "
            "the bound says nothing (three times the measured).",
            partial(_predictions, [r for r in found if r.kind == "source"]),
            (13, 4.4),
        ),
        Chart(
            "inputs",
            "The largest entry of what enters attention over the root mean square, and R of both "
            "(mean over heads), by layer and text.",
            partial(_inputs, found),
            (13, 4.4),
        ),
    ]
    for name in dict.fromkeys(r.subject.name for r in rotated):
        own = [r for r in rotated if r.subject.name == name]
        charts.append(
            Chart(
                f"rope_{name}",
                f"{name} under other RoPE rules, without training. Left: R by distance over that "
                "without a rotation, median head (band: all heads, for the model's own rotation). "
                "Others: medians of heads, and the loss, at its context and beyond.",
                partial(_rope, own),
                (13, 4.2),
            )
        )
    return charts


def _predictions(found: Sequence[Radii], figure: Any) -> None:
    spread, keys, largest = figure.subplots(1, 3)
    for i, r in enumerate(found):
        style: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKS[i % len(MARKS)],
            "s": 22,
            "alpha": 0.8,
            "label": r.label,
        }
        spread.scatter(r.by_rms.flatten(), r.spread.flatten(), **style)
        keys.scatter(r.by_rms.flatten(), r.share.flatten(), **style)
        largest.scatter(r.bound.flatten(), r.largest.flatten(), **style)
    for axes in (spread, keys, largest):
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
    for axes in (spread, largest):
        axes.set_yscale("log")
    for axis in (spread.xaxis, spread.yaxis, keys.xaxis, largest.xaxis, largest.yaxis):
        _plain_ticks(axis)
    for axes, factor in ((spread, 1), (largest, 1), (largest, 3)):
        ends, line = (axes.get_xlim(), axes.get_ylim()), torch.tensor([1e-3, 1e6])
        dashes = "-" if factor == 1 else "--"
        axes.plot(line, line / factor, color="0.6", lw=1, ls=dashes, zorder=0)
        axes.set(xlim=ends[0], ylim=ends[1])
    spread.set(xlabel="R (nats)", ylabel="sigma (nats)", title="Spread of a row's logits")
    keys.set(xlabel="R (nats)", ylabel="k / n", title="Keys that miss 5 % of the mass", ylim=(0, 1))
    largest.set(xlabel="bound (nats)", ylabel="measured (nats)", title="Largest logit")
    _legend(figure, spread)


def _plain_ticks(axis: Any) -> None:
    """Numbers on a logarithmic axis, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _inputs(found: Sequence[Radii], figure: Any) -> None:
    ratio, by_rms, by_largest = figure.subplots(1, 3)
    models = list(dict.fromkeys(r.label for r in found))
    kinds = list(dict.fromkeys(r.kind for r in found))
    dashes = ("-", "--", "-.", ":")
    for r in found:
        style: dict[str, Any] = {
            "color": COLOURS[models.index(r.label) % len(COLOURS)],
            "ls": dashes[kinds.index(r.kind) % len(dashes)],
            "marker": MARKS[models.index(r.label) % len(MARKS)],
            "ms": 4,
            "label": f"{r.label}, on {r.kind}",
        }
        layers = r.subject.layers
        ratio.plot(layers, [x.largest_over_rms for x in r.inputs], **style)
        by_rms.plot(layers, r.by_rms.mean(1), **style)
        by_largest.plot(layers, r.by_largest.mean(1), **style)
    ratio.set(title="B / RMS", ylim=(0, None))
    by_rms.set(title="R, root mean square for B (nats)", ylim=(0, None))
    by_largest.set(title="R, largest entry for B (nats)", ylim=(0, None))
    for axes in (ratio, by_rms, by_largest):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    _legend(figure, ratio)


def _rope(rotated: Sequence[Rotated], figure: Any) -> None:
    norms, spread, keys, loss = figure.subplots(1, 4)
    without = next((r for r in rotated if r.rule == NONE), None)
    for i, one in enumerate(rotated):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "label": one.rule}
        if without is not None:
            # [heads, distances]; the distance 0 has no place on a logarithmic axis.
            ratio = (one.weight / without.weight).flatten(0, 1)[:, 1:]
            at = one.distances[1:]
            norms.plot(at, ratio.median(0).values, **style, lw=1.3)
            if one.rule == OWN:
                low, high = ratio.amin(0), ratio.amax(0)
                norms.fill_between(at, low, high, color=style["color"], alpha=0.12, lw=0)
        lengths, radii = list(one.radii), list(one.radii.values())
        style |= {"marker": MARKS[i % len(MARKS)], "ms": 4}
        spread.plot(lengths, [float(r.spread.median()) for r in radii], **style)
        keys.plot(lengths, [float(r.share.median()) for r in radii], **style)
        loss.plot(lengths, [r.loss for r in radii], **style)
    norms.set(xscale="log", xlabel="distance (tokens)", title="R / R without rotation")
    spread.set(title="sigma (nats)")
    keys.set(title="k / n, 5 % missed")
    loss.set(title="loss (nats)")
    for axes in (spread, keys, loss):
        axes.set_xscale("log")
        axes.set_xticks(ticks := list(rotated[0].radii), map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel("length (tokens)")
    for axes in (norms, spread, keys, loss):
        axes.grid(alpha=0.25)
    _legend(figure, spread)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
