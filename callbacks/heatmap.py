"""One figure of several layer x head heat maps, comparable from step to step and run to run.

A quantity has the same colours over the same range in every figure. Colours say one thing: where a
value can be bad, the dark red end is the bad one, whether that is high or low; where both ends are,
the middle is white; where neither is, they run from blue to yellow. All three stay apart for
colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# White reaches far to both sides: near the ends is where the alerts are.
_FROM_THE_MIDDLE = np.linspace(-1, 1, 256)
_COLOURS = {
    "high is worse": colormaps["YlOrRd"],
    "low is worse": colormaps["YlOrRd_r"],
    "both ends are bad": ListedColormap(
        colormaps["PuOr"](0.5 + 0.5 * _FROM_THE_MIDDLE * abs(_FROM_THE_MIDDLE) ** 1.5)
    ),
    "": colormaps["cividis"],
}


@dataclass(frozen=True)
class Scale:
    """The range of a panel's colours.

    Args:
        low, high: ends of the range; values past them are marked.
        bad: what the colours mean.
        unit: of the values, for the colour bar; empty for shares.
        log: whether colours follow the logarithm of the value.
    """

    low: float
    high: float
    bad: Literal["high is worse", "low is worse", "both ends are bad", ""] = ""
    unit: str = ""
    log: bool = False


_SHARE_HIGH, _SHARE_LOW = Scale(0, 1, "high is worse"), Scale(0, 1, "low is worse")
_KEYS = Scale(1, 10_000, unit="keys", log=True)

SCALES: dict[str, Scale] = {
    "missed mass": _SHARE_HIGH,
    "captured mass": _SHARE_LOW,
    "output error": _SHARE_HIGH,
    "recall": _SHARE_LOW,
    "kl": Scale(0, 3, "high is worse", "nats"),
    "entropy": Scale(0, 12, unit="nats"),
    "entropy ratio": Scale(0, 1, "both ends are bad"),
    "effective support": _KEYS,
    "participation": _KEYS,
    "max weight": _SHARE_HIGH,
    "saturated": _SHARE_HIGH,
    "collision": _SHARE_HIGH,
    "jacobian trace": _SHARE_LOW,
    "sink mass": Scale(0, 1),
    "logit std": Scale(0, 6, unit="nats"),
    "logit max": Scale(0, 100, "high is worse", "nats"),
    "logit range": Scale(0, 100, unit="nats"),
    "range margin": Scale(-10, 10, "low is worse", "nats"),
    "gamma": _SHARE_HIGH,
    "gamma of entropy": _SHARE_HIGH,
    "rank residual": Scale(0.01, 1, "low is worse", log=True),
    "cosine": Scale(-1, 1, "high is worse"),
}
"""Name of a panel, with or without " without sink" behind it -> its scale."""


def heat_maps(
    panels: Mapping[str, Tensor],
    title: str,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Draw each panel [layers, heads] on the scale of its name, with values where there is room.

    A triangle marks a cell whose value lies past the scale, pointing up or down; a grey cell has no
    value (NaN). Layer 0 is at the top.

    Args:
        panels: name -> values, of one shape; a name that `SCALES` lacks gets the range of its
            values, and says so.
        title: of the figure.
        layers, heads: their numbers; None: from 0.
    """
    shape = next(iter(panels.values())).shape
    rows_of = list(range(shape[0])) if layers is None else list(layers)
    columns_of = list(range(shape[1])) if heads is None else list(heads)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    # Inches of a panel; around it are its ticks, labels, title and colour bar.
    width = max(0.8 + 0.3 * min(shape[1], 10), 5 / columns - 1.3)
    height = 0.4 + 0.24 * min(max(shape[0], 2), 16)
    size = (columns * (width + 1.3), rows * (height + 0.75) + 0.35)
    # Figure, not pyplot: no global state, no window system, nothing to close.
    figure = Figure(figsize=size, dpi=90)
    # Placed here: to let matplotlib find room costs as much as the drawing itself.
    figure.subplots_adjust(
        left=0.5 / size[0],
        right=1 - 0.8 / size[0],
        bottom=0.45 / size[1],
        top=1 - 0.65 / size[1],
        wspace=1.3 / width,
        hspace=0.75 / height,
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, values) in zip(axes, panels.items(), strict=False):
        _draw(figure, axis, name, values.double().cpu().numpy())
        _number(axis.xaxis, columns_of)
        _number(axis.yaxis, rows_of)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11, y=1 - 0.2 / size[1], va="center")
    return figure


def _draw(figure: Figure, axis: Any, name: str, data: np.ndarray) -> None:
    scale = _scale_of(name, data)
    norm = (LogNorm if scale.log else Normalize)(scale.low, scale.high)
    colours = _COLOURS[scale.bad].with_extremes(bad="0.75")
    # A logarithmic scale has no colour for 0.
    shown = data.clip(scale.low, scale.high)
    image = axis.imshow(shown, aspect="auto", norm=norm, cmap=colours, interpolation="nearest")
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("head", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(labelsize=7)

    over, under = data > scale.high, data < scale.low
    extend = {(False, False): "neither", (True, False): "max", (False, True): "min"}
    beyond = extend.get((bool(over.any()), bool(under.any())), "both")
    wide = 0.1 / (axis.get_position().width * figure.get_figwidth())
    beside = axis.inset_axes((1 + wide, 0, wide, 1))
    bar = figure.colorbar(image, cax=beside, extend=beyond, extendfrac=0.04)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(", ".join(filter(None, (scale.unit, scale.bad))), fontsize=7)

    written = data.size <= 64
    if written:
        for (layer, head), value in np.ndenumerate(data):
            if np.isfinite(value):
                colour = "white" if _is_dark(image.to_rgba(shown[layer, head])) else "black"
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                axis.text(head, layer, _short(value), **style)
    # Beside the number in the corner of a cell, or in the middle of a small one.
    shift, size = (0.32, 14) if written else (0.0, 8)
    for past, marker in ((over, "^"), (under, "v")):
        layer, head = past.nonzero()
        axis.scatter(head + shift, layer - shift, size, c="white", marker=marker, ec="k", lw=0.5)


def _scale_of(name: str, data: np.ndarray) -> Scale:
    known = SCALES.get(name.replace("_", " ").removesuffix(" without sink"))
    if known is not None:
        return known
    real = data[np.isfinite(data)]
    low, high = (float(real.min()), float(real.max())) if real.size else (0.0, 1.0)
    return Scale(low, high if high > low else low + 1, unit="range of this figure")


def _number(axis: Any, numbers: Sequence[int]) -> None:
    shown = MaxNLocator(8, integer=True).tick_values(0, max(len(numbers) - 1, 1))
    places = [int(place) for place in shown if 0 <= place < len(numbers)]
    axis.set_ticks(places, [str(numbers[place]) for place in places])


def _is_dark(colour: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _short(value: float) -> str:
    """Four characters at most for the sizes that occur: cells are narrow."""
    if abs(value) >= 1000:
        return f"{value / 1000:.0f}k"
    digits = 0 if abs(value) >= 10 else 1 if abs(value) >= 1 else 2
    return f"{value:.{digits}f}"
