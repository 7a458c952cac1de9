"""The heat maps of retrieval: where in a text, and in how long a text, a model finds what it told.

Dark blue is never, yellow is always, in every figure; the colours stay apart for colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_sparse.evaluation.answers import Answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 5
"""Parts of a text that a heat map tells apart."""


def draw_answers(
    figure: Any, answers: Mapping[str, Mapping[int, Mapping[str, Answers]]], title: str
) -> None:
    """Draw a heat map of each task (columns) as each side measured it (rows).

    Args:
        figure: of matplotlib, or a part of one.
        answers: task -> length in tokens -> side -> answers.
        title: above all.
    """
    sides = list(dict.fromkeys(s for at in answers.values() for own in at.values() for s in own))
    axes = figure.subplots(len(sides), len(answers), squeeze=False)
    image = None
    for row, side in zip(axes, sides, strict=True):
        for axis, (task, at) in zip(row, answers.items(), strict=True):
            own = {length: found[side] for length, found in at.items() if side in found}
            if own:
                image = _draw(axis, own)
                axis.set_title(f"{task}, {side}", fontsize=9)
            else:  # a task that only later, longer stages ask
                axis.set_axis_off()
    figure.suptitle(f"{title}: share of prompts answered right", fontsize=10)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("%", fontsize=7)


def answers_figure(
    answers: Mapping[str, Mapping[int, Mapping[str, Answers]]], title: str
) -> Figure:
    """`draw_answers` on a figure of its own."""
    from matplotlib.figure import Figure

    rows = max((len(own) for at in answers.values() for own in at.values()), default=1)
    size = (max(2.4 * len(answers) + 1, 4.5), 2.2 * rows + 0.6)
    figure = Figure(figsize=size, dpi=90, layout="constrained")
    draw_answers(figure, answers, title)
    return figure


def _draw(axis: Any, answers: Mapping[int, Answers]) -> Any:
    """One heat map, depth by length, with its numbers."""
    parts = min(DEPTHS, *(len(own.depths) for own in answers.values()))
    shares = 100 * np.stack([own.by_depth(parts) for own in answers.values()], 1)
    image = axis.imshow(shares, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            colour = "black" if share > 50 else "white"
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axis.text(column, row, f"{share:.0f}", **style)
    turned = {"rotation": 45, "ha": "right"} if len(answers) > 5 else {}
    lengths = [str(length) for length in answers]
    axis.set_xticks(range(len(answers)), lengths, fontsize=7, **turned)
    axis.set_xlabel("tokens", fontsize=7)
    if len(shares) > 1:
        edges = [f"{100 * i // parts}-{100 * (i + 1) // parts} %" for i in range(parts)]
        axis.set_yticks(range(parts), edges, fontsize=7)
        axis.set_ylabel("depth", fontsize=7)
    else:
        axis.set_yticks([0], ["all"], fontsize=7)
    return image
