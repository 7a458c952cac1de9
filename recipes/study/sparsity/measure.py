"""What is measured: keys needed, and the losses of budgets, of one draw after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse import theory
from lit_sparse.budget import Budget
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.inputs import Growth, draw, rademacher
from lit_sparse.recipes.study.top_keys import (
    SortedRows,
    collision,
    entropy,
    geometric_mean,
    keys_needed,
    missed_mass,
    rms,
)

MISSED = 0.05

FIXED, SHARP, SLOW, HALF = Growth.fixed(1), Growth.fixed(4), Growth.slow(), Growth.at_gamma(0.5)
GROWTHS = (FIXED, Growth.fixed(2), SHARP, SLOW, Growth.at_gamma(0.25), HALF, Growth.at_gamma(0.75))
LOSS_GROWTHS = (FIXED, SLOW, HALF)
"""Those at which budgets are compared: bounded logits, slower than sqrt(ln n), like it."""

POWERS = {"n^.25": 0.25, "n^.5": 0.5, "n^.75": 0.75}
LOGS = ("sqrt(ln n)", ".5 log2 n", "log2 n")
BUDGETS: Mapping[str, Callable[[int], int]] = {
    "sqrt(ln n)": lambda n: math.ceil(math.log(n) ** 0.5),
    ".5 log2 n": Budget.log(0.5 / math.log(2), sink=0),
    "log2 n": Budget.log(1 / math.log(2), sink=0),
    **{name: Budget(1, power, floor=0, sink=0) for name, power in POWERS.items()},
    "n / 8": Budget(1 / 8, 1, floor=0, sink=0),
}

ENTRY, MASS = "largest dropped weight", "dropped mass"
INDEPENDENT, LINEAR = "output, independent values", "output, linear values"
FORMULA = "output, formula"
WORST = "worst of n rows"
NORMS = (ENTRY, MASS, INDEPENDENT, LINEAR)
WORST_BUDGETS = ("sqrt(ln n)", ".5 log2 n", "log2 n", "n^.5")

_CHUNK = 2**22


@dataclass(frozen=True)
class Measured:
    """`of[what, growth]` and `of[norm, growth, budget]` are [repetitions, lengths].

    "keys" is k_eps and "gaussian" its closed form at each row's own sigma, geometric means over the
    heads; "support" is exp(entropy), likewise. Losses are means over the heads (of squares, for
    outputs) but for the largest dropped weight, which is the largest of all heads.
    """

    lengths: Sequence[int]
    repetitions: int
    heads: int
    of: Mapping[tuple[str, ...], np.ndarray]


def measure(settings: Settings) -> Measured:
    lengths = [2**i for i in (range(10, 15) if settings.quick else range(10, 18))]
    repetitions, heads = (12, 8) if settings.quick else (48, 8)
    found: dict[tuple[str, ...], np.ndarray] = {}
    for repetition in range(repetitions):
        settings.progress(f"repetition {repetition + 1} of {repetitions}")
        generator = torch.Generator().manual_seed(settings.seed * repetitions + repetition)
        drawn = draw(rademacher, lengths[-1], heads, generator)
        for place, n in enumerate(lengths):
            rows = SortedRows.of(drawn.nearest(n))
            for key, value in _measured(rows, n, generator).items():
                table = found.setdefault(key, np.zeros((repetitions, len(lengths))))
                table[repetition, place] = value
    return Measured(lengths, repetitions, heads, found)


def _measured(rows: SortedRows, n: int, generator: torch.Generator) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for growth in GROWTHS:
        radius = growth.radius(n)
        weights = rows.weights(radius)
        share = theory.gaussian_keys_fraction(rows.std * radius, MISSED)
        found["keys", growth.name] = geometric_mean(keys_needed(weights, MISSED))
        found["gaussian", growth.name] = n * geometric_mean(share)
        found["support", growth.name] = geometric_mean(entropy(weights).exp())
        if growth in LOSS_GROWTHS:
            for norm, losses in _losses(rows, radius, weights, n).items():
                for budget, loss in zip(BUDGETS, losses, strict=True):
                    found[norm, growth.name, budget] = loss
        if growth is FIXED:
            for budget in WORST_BUDGETS:
                kept = weights[0, : BUDGETS[budget](n)]
                found[WORST, growth.name, budget] = worst_of_rows(kept, n, generator)
    return found


def _losses(rows: SortedRows, radius: float, weights: Tensor, n: int) -> dict[str, list[float]]:
    """By norm, for every budget."""
    keys = [budget(n) for budget in BUDGETS.values()]
    missed = [missed_mass(weights, k) for k in keys]
    formula = [
        theory.output_error_of_independent_values(
            tau.clamp(max=1), collision(weights[:, :k]), collision(weights[:, k:])
        )
        for k, tau in zip(keys, missed, strict=True)
    ]
    independent = rows.output_errors(radius, keys, rows.rows.values)
    linear = rows.output_errors(radius, keys, rows.rows.linear_values)
    return {
        ENTRY: [float(weights[:, k].max()) for k in keys],
        MASS: [float(tau.mean()) for tau in missed],
        INDEPENDENT: [rms(error) for error in independent.T],
        LINEAR: [rms(error) for error in linear.T],
        FORMULA: [rms(error) for error in formula],
    }


def worst_of_rows(kept: Tensor, n: int, generator: torch.Generator) -> float:
    """The largest error of an output entry over n rows, by values -1 or 1 that the scores do not
    know.

    Every row has the weights `kept` [k], renormalised, on k keys of its own drawing; with values
    independent of the scores, which keys those are does not matter. The mean of all values, which
    dense attention of many keys is near to, is 0.
    """
    weights, worst = kept / kept.sum(), 0.0
    step = max(_CHUNK // len(kept), 1)
    for begin in range(0, n, step):
        values = rademacher(min(step, n - begin), len(kept), generator)
        worst = max(worst, float((values @ weights).abs().max()))
    # Signs that all agree give 1 but for the rounding of their sum.
    return round(worst, 6)
