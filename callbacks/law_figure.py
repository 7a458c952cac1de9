"""The figure of the law: keys against context, with the curriculum's stages on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import default_tile
from lit_sparse.budget import Budget
from lit_sparse.models import Law
from lit_sparse.training.curriculum import Stage

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's: they stay apart for colour-blind eyes."""

_NAMED = 3
"""Budgets of single layers that the legend tells apart."""

_PLANNED = 2**18
"""Contexts past it are not planned tile by tile: a plan of a million tokens takes seconds."""


def law_figure(
    law: Law, stages: Sequence[Stage], longest: int, *, factor: float = 1.0, groups: int = 1
) -> Figure:
    """Draw k(n) against n, both in tokens on logarithmic axes.

    A coloured line is a budget, in grey beside it what its whole blocks keep; dots are the stages,
    at their length, with the keys of a query there and their share of the context. A hollow dot is
    a dense stage.

    Args:
        law: what holds where a stage sets no budget, before the factor.
        stages: of the curriculum; may be empty.
        longest: the longest context to draw, in tokens.
        factor: on every alpha.
        groups: query heads a key-value head, which the default tile depends on.
    """
    lengths = sorted({stage.length for stage in stages})
    first = max(law.block, (lengths[0] if lengths else longest // 64) // 16)
    n = torch.from_numpy(np.geomspace(first, longest, 300).round().astype(np.int64))
    # A dense stage obeys no budget.
    sparse = [stage.budget or law.budget for stage in stages if stage.attention == "sparse"]
    colours = dict(zip(dict.fromkeys(sparse or [law.budget]), cycle(_COLOURS), strict=False))
    tile = default_tile(groups) if law.tile is None else law.tile

    figure = Figure(figsize=(7.5, 4.6), dpi=90)
    axis = figure.add_subplot()
    axis.plot([first, longest], [first, longest], "--", c="0.6", lw=1, label="every key (dense)")
    label = f"kept in whole blocks of {law.block}"
    for budget, colour in colours.items():
        scaled = budget.scaled(factor)
        axis.step(*_kept(scaled, law.block, tile, longest), c="0.75", lw=1, label=label, zorder=1)
        axis.plot(n, scaled(n), c=colour, lw=2, label=str(scaled))
        label = ""  # one entry of the legend for all
    for name, budget in _of_layers(law, factor):
        axis.plot(n, budget(n), ":", c="0.4", lw=1.2, label=name)
    for stage in stages:
        if stage.attention == "dense":
            _dot(axis, stage.length, stage.length, "dense", "0.4", "white")
        else:
            budget = stage.budget or law.budget
            keys = budget.scaled(factor)(stage.length)
            text = f"{keys:,}\n{keys / stage.length:.0%}"
            _dot(axis, stage.length, keys, text, colours[budget], colours[budget])

    least = min(budget.scaled(factor)(first) for budget in colours)
    _number(axis, lengths or _doublings(first, longest), _doublings(least, longest))
    axis.set_xlim(first / 1.2, longest * 1.3)
    axis.set_ylim(bottom=least / 2)
    axis.set_title(
        "Keys that a query may attend to" + (f", alpha times {factor:.3g}" if factor != 1 else ""),
        fontsize=11,
    )
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    figure.tight_layout()
    return figure


def _kept(budget: Budget, block: int, tile: int, longest: int) -> tuple[Any, Any]:
    """Nominal end of each tile of one long document, and the keys that its list holds at most."""
    length = min(longest, _PLANNED)
    plan = make_plan((0, length), (0, length), budget, block, tile)
    ends = plan.start + tile
    return ends, np.minimum(plan.lengths * block, ends)


def _of_layers(law: Law, factor: float) -> Iterator[tuple[str, Budget]]:
    """Budgets of single layers, with a name for the legend; the rest of many share one."""
    found: dict[Budget, list[int]] = {}
    for layer, budget in law.layers.items():
        found.setdefault(budget.scaled(factor), []).append(layer)
    for i, (budget, layers) in enumerate(found.items()):
        which = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        says = "dense" if budget == Budget.dense() else str(budget)
        if len(found) <= _NAMED:
            yield f"{which}: {says}", budget
        else:
            yield "" if i else f"budgets of {len(law.layers)} single layers", budget


def _dot(axis: Any, x: int, y: int, text: str, colour: str, face: str) -> None:
    axis.plot(x, y, "o", ms=8, mfc=face, mec=colour, zorder=4)
    axis.axvline(x, c="0.9", lw=1, zorder=0)
    below = -13 - 10 * len(text.splitlines())
    style = {"fontsize": 8, "color": colour, "ha": "center", "textcoords": "offset points"}
    box = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.85}
    axis.annotate(text, (x, y), (0, below), bbox=box, **style)


def _doublings(low: int, high: int) -> list[int]:
    """At most nine powers of two from about `low` to `high`."""
    powers = [2**i for i in range(max(low, 1).bit_length() - 1, high.bit_length())]
    return powers[:: 1 + (len(powers) - 1) // 9]


def _number(axis: Any, lengths: Sequence[int], keys: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for one, ticks in ((axis.xaxis, lengths), (axis.yaxis, keys)):
        one.set_major_locator(FixedLocator(list(ticks)))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))
    axis.set_xlabel("context n of a query (tokens)")
    axis.set_ylabel("keys k(n)")
    axis.spines[["top", "right"]].set_visible(False)


def _tokens(n: int) -> str:
    """8192 as 8k: lengths are powers of two most of the time."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if n >= size and n % size == 0:
            return f"{n // size}{letter}"
    return str(n)
