"""The figure of the law: keys against context, with the curriculum's stages on it."""

from __future__ import annotations

from collections.abc import Sequence
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
    tile = default_tile(groups) if law.tile is None else law.tile
    budgets = [(stage.budget or law.budget).scaled(factor) for stage in stages]
    drawn = list(dict.fromkeys([*budgets, law.budget.scaled(factor)][: len(budgets) or 1]))
    figure = Figure(figsize=(7.5, 4.6), dpi=90)
    axis = figure.add_subplot()
    lengths = sorted({stage.length for stage in stages})
    first = max(law.block, (lengths[0] if lengths else longest // 64) // 16)
    n = torch.from_numpy(np.unique(np.geomspace(first, longest, 300).round().astype(np.int64)))
    axis.plot([first, longest], [first, longest], "--", c="0.6", lw=1, label="every key (dense)")
    for i, budget in enumerate(drawn):
        contexts, kept = _kept(budget, law.block, tile, longest)
        label = f"kept in whole blocks of {law.block}" if i == 0 else None
        axis.step(contexts, kept, where="pre", c="0.75", lw=1, label=label, zorder=1)
        axis.plot(n, budget(n), c=_COLOURS[i % len(_COLOURS)], lw=2, label=_short(budget))
    for i, (own, layers) in enumerate(_by_budget(law, factor)):
        which = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        style = (":", "-.", (0, (5, 1, 1, 1, 1, 1)))[i % 3]
        axis.plot(n, own(n), ls=style, c="0.3", lw=1.5, label=f"{which}: {_short(own)}")
    for stage, budget in zip(stages, budgets, strict=True):
        dense = stage.attention == "dense"
        colour = "0.4" if dense else _COLOURS[drawn.index(budget) % len(_COLOURS)]
        keys = stage.length if dense else budget(stage.length)
        face = "white" if dense else colour
        axis.plot(stage.length, keys, "o", ms=8, mfc=face, mec=colour, zorder=4)
        text = "dense" if dense else f"{keys:,}\n{keys / stage.length:.0%}"
        axis.annotate(
            text,
            (stage.length, keys),
            (0, -18 if dense else -27),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
            bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.85},
        )

    axis.set_xscale("log", base=2)
    axis.set_xlim(first / 1.2, longest * 1.3)
    axis.set_yscale("log", base=2)
    for length in lengths:
        axis.axvline(length, c="0.9", lw=1, zorder=0)
    _tick(axis.xaxis, lengths or [2**i for i in range(first.bit_length(), longest.bit_length())])
    low, high = (int(np.log2(y)) for y in (max(1, min(b(first) for b in drawn)), longest))
    _tick(axis.yaxis, [2**i for i in range(low, high + 1)][:: max(1, (high - low) // 8)])
    axis.set_ylim(bottom=min(b(first) for b in drawn) / 2)
    axis.set_xlabel("context n of a query (tokens)")
    axis.set_ylabel("keys k(n)")
    scaled = "" if factor == 1 else f", alpha scaled by {factor:.3g}"
    axis.set_title(f"Keys that a query may attend to{scaled}", fontsize=11)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _kept(budget: Budget, block: int, tile: int, longest: int) -> tuple[Any, Any]:
    """Nominal end of each tile of one long document, and the keys that its list holds at most."""
    length = min(longest, _PLANNED)
    plan = make_plan((0, length), (0, length), budget, block, tile)
    ends = plan.start + tile
    return ends, np.minimum(plan.lengths * block, ends)


def _by_budget(law: Law, factor: float) -> list[tuple[Budget, list[int]]]:
    """Budgets of single layers, each with the layers that have it."""
    found: dict[Budget, list[int]] = {}
    for layer, budget in law.layers.items():
        found.setdefault(budget.scaled(factor), []).append(layer)
    return list(found.items())


def _short(budget: Budget) -> str:
    return "dense" if budget == Budget.dense() else str(budget)


def _tick(axis: Any, values: Sequence[int]) -> None:
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))


def _tokens(n: int) -> str:
    """8192 as 8k: lengths are powers of two most of the time."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if n >= size and n % size == 0:
            return f"{n // size}{letter}"
    return str(n)
