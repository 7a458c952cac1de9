"""Figures of sparsity by depth: keys against context, heat maps of heads, inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_sparse.recipes.study.entries import Entries
from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.layers.depth import MAIN, Depth
from lit_sparse.recipes.study.report import COLOURS


def all_of(found: Sequence[Depth]) -> list[Chart]:
    rows = -(-len(found) // _ACROSS)
    return [
        Chart(
            "keys",
            "Keys that have 95 % of a row's mass against the context, by layer: mean over heads "
            "and rows; band: from the least to the most of the heads' means. Grey: every key.",
            partial(_keys, found),
            (11, 0.6 + 3.2 * rows),
        ),
        Chart(
            "heads",
            "By layer and head: C of all keys, C of the far keys, the share of the keys that a row "
            "of the longest texts needs, mass of the sink and of the nearest tokens.",
            partial(_heads, found),
            (12, 0.9 + _height(found) * len(found)),
        ),
        Chart(
            "inputs",
            "What enters attention, by layer, against independent normal entries of mean 0 (grey).",
            partial(_inputs, found),
            (13, 3.8),
        ),
    ]


_ACROSS = 3
"""Panels side by side: the conditions of one model."""


def _height(found: Sequence[Depth]) -> float:
    return min(max(1.2, 0.22 * max(len(depth.main.layers) for depth in found)), 4)


def _keys(found: Sequence[Depth], figure: Any) -> None:
    rows = -(-len(found) // _ACROSS)
    grid = figure.subplots(rows, _ACROSS, squeeze=False, sharex=True, sharey=True).flatten()
    for number, (axes, depth) in enumerate(zip(grid, found, strict=False)):
        needs = depth.measured.needs[MAIN]
        groups = depth.measured.by_length()
        n = [float(needs.context[own].double().mean()) for own in groups.values()]
        axes.plot(n, n, color="0.6", lw=1)
        for place, layer in enumerate(needs.layers):
            heads = [needs.keys[own][:, place].double().mean(0) for own in groups.values()]
            colour = _layer_colour(place, len(needs.layers))
            label = f"layer {layer}" if place in _named(len(needs.layers)) else None
            axes.plot(n, [float(x.mean()) for x in heads], "o-", ms=3, color=colour, label=label)
            low, high = ([float(f(x)) for x in heads] for f in (Tensor.amin, Tensor.amax))
            axes.fill_between(n, low, high, color=colour, alpha=0.12, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="context n (tokens)", ylabel="keys")
        axes.set_title(depth.measured.label, fontsize=9)
        ticks = [round(value) for value in (n if len(n) < 5 else n[::2])]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_yticks(ys := [2**i for i in range(13) if 2**i <= 1.2 * max(n)], map(str, ys))
        axes.set_ylim(bottom=1)
        axes.grid(alpha=0.25)
        if number % _ACROSS == 0:
            axes.legend(fontsize=8)
    for axes in grid[len(found) :]:
        axes.set_visible(False)


def _layer_colour(place: int, count: int) -> Any:
    if count <= len(COLOURS):
        return COLOURS[place]
    from matplotlib import colormaps

    return colormaps["viridis"](place / (count - 1))


def _named(count: int) -> set[int]:
    """Layers of the legend."""
    return set(range(count)) if count <= len(COLOURS) else {0, count // 2, count - 1}


def _heads(found: Sequence[Depth], figure: Any) -> None:
    maps: tuple[tuple[str, Callable[[Depth], Tensor], float], ...] = (
        ("C, all keys", lambda d: d.main.raw_exponent, 1.2),
        ("C, far keys", lambda d: d.fits["far", MAIN[1]].raw_exponent, 1.2),
        ("k / n, longest texts", lambda d: d.share, 1.0),
        ("sink mass", lambda d: d.measured.sink_mass.mean(0), 1.0),
        ("local mass", lambda d: d.measured.local_mass.mean(0), 1.0),
    )
    grid = figure.subplots(len(found), len(maps), squeeze=False)
    for i, depth in enumerate(found):
        step = -(-len(depth.main.layers) // 8)
        for j, (title, of, top) in enumerate(maps):
            axes, values = grid[i, j], of(depth)
            image = axes.imshow(values, vmin=0, vmax=top, cmap="cividis", aspect="auto")
            _numbers(axes, values, top)
            axes.set_xticks(range(values.shape[1]) if values.shape[1] <= 8 else [])
            axes.set_yticks(range(0, len(values), step), depth.main.layers[::step])
            if i == 0:
                axes.set_title(title, fontsize=10)
            if i == len(found) - 1:
                axes.set_xlabel("head")
                figure.colorbar(image, ax=grid[:, j], orientation="horizontal", aspect=18)
        grid[i, 0].set_ylabel(depth.measured.label.replace(", ", "\n") + "\nlayer", fontsize=8)


def _numbers(axes: Any, values: Tensor, top: float) -> None:
    """In the cells, where there is room."""
    if len(values) > 8 or values.shape[1] > 5:
        return
    for place, layer in enumerate(values.tolist()):
        for head, value in enumerate(layer):
            colour = "black" if value > 0.55 * top else "white"
            axes.text(
                head, place, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour
            )


def _inputs(found: Sequence[Depth], figure: Any) -> None:
    panels: tuple[tuple[str, Callable[[Entries], float], float | None], ...] = (
        ("largest / RMS", lambda x: x.largest_over_rms, None),
        ("excess kurtosis", lambda x: x.excess_kurtosis, 0.0),
        ("power all tokens share", lambda x: x.mean_share, 0.0),
        ("cosine of two tokens", lambda x: x.token_cosine, 0.0),
        ("effective dimensions\n/ independent", lambda x: x.dimension_share, 1.0),
    )
    styles = ("o-", "s--", "^:")
    for axes, (title, of, ideal) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        if ideal is not None:
            axes.axhline(ideal, color="0.6", lw=1)
        for i, depth in enumerate(found):
            inputs = depth.measured.inputs
            axes.plot(
                list(inputs), [of(x) for x in inputs.values()], styles[i % len(styles)], ms=4,
                color=COLOURS[i // len(styles) % len(COLOURS)], label=depth.measured.label,
            )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
