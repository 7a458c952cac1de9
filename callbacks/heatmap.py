"""One figure of several layer x head heat maps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def heat_maps(
    panels: Mapping[str, Tensor],
    title: str,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Draw each panel [layers, heads] with its own colour bar, and values where there is room.

    Args:
        panels: name -> values.
        limits: name -> colour range; the range of the values where it is left out.
    """
    limits = limits or {}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    layers, heads = next(iter(panels.values())).shape
    # Figure, not pyplot: no global state, no window system, nothing to close.
    figure = Figure(figsize=(4.2 * columns, 0.9 + rows * (1.3 + 0.22 * min(layers, 12))), dpi=90)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axis, (name, values) in zip(axes, panels.items(), strict=False):
        low, high = limits.get(name, (None, None))
        data = values.float().cpu().numpy()
        image = axis.imshow(data, aspect="auto", vmin=low, vmax=high, cmap="viridis")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("head", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        for ticks, count in ((axis.set_xticks, heads), (axis.set_yticks, layers)):
            ticks(range(0, count, max(1, count // 8)))
        axis.tick_params(labelsize=7)
        figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03).ax.tick_params(labelsize=7)
        if layers * heads <= 64:
            _write_values(axis, data, image)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure


def _write_values(axis, data: np.ndarray, image) -> None:
    low, high = image.get_clim()
    for (layer, head), value in np.ndenumerate(data):
        bright = high > low and (value - low) / (high - low) > 0.6
        colour = "black" if bright else "white"
        axis.text(head, layer, _short(value), ha="center", va="center", fontsize=7, color=colour)


def _short(value: float) -> str:
    """Four characters at most for the sizes that occur: cells are narrow."""
    digits = 0 if abs(value) >= 10 else 1 if abs(value) >= 1 else 2
    return f"{value:.{digits}f}"
