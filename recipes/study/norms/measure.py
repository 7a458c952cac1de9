"""What is measured: how concentrated rows are by n and temperature, and their largest logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse import theory
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.inputs import D_MODEL, Growth, draw, rademacher, uniform
from lit_sparse.recipes.study.top_keys import SortedRows, collision, entropy

GAMMAS = (
    *(0.05, 0.15, 0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75),
    *(2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
)
"""sigma^2 / (2 ln n), sigma the measured standard deviation of a row's logits."""

FEW = 16
ONE_HOLDS, FEW_HOLD = "one key has half", f"{FEW} keys have half"
"""Criteria of collapse: more than half of a row's mass."""

STATISTICS = (
    "max weight",
    "entropy ratio",
    "support",
    "collision",
    f"mass of {FEW} keys",
    "mass of n^.5 keys",
    ONE_HOLDS,
    FEW_HOLD,
)

FIXED, SAME_RATE, BEYOND = Growth.fixed(4), Growth.at_gamma(0.5), Growth.at_gamma(2)
FASTER = (Growth.logarithmic(0.5), Growth.power(0.5, 0.25))
GROWTHS = (FIXED, SAME_RATE, BEYOND, *FASTER)

ENTRIES = {"-1 or 1": rademacher, "uniform in [-1, 1]": uniform}

DELTA = 0.05
"""Probability with which the bound on the largest logit may fail."""


@dataclass(frozen=True)
class Measured:
    """`at_gamma[statistic]` [repetitions, lengths, gammas] and `of[statistic, growth]`
    [repetitions, lengths] are means over the heads, "support" (exp of the entropy) a geometric one.
    """

    lengths: Sequence[int]
    repetitions: int
    heads: int
    at_gamma: Mapping[str, np.ndarray]
    of: Mapping[tuple[str, str], np.ndarray]
    bounds: Mapping[str, Bounds]


@dataclass(frozen=True)
class Bounds:
    """The largest |logit| at R = 1, and what bounds it; [repetitions, lengths, heads] each."""

    largest: np.ndarray
    std: np.ndarray
    of_row: np.ndarray
    """M of the row's own R_i = B ||W^T x_i||_2."""
    of_radius: np.ndarray
    """M of R = B^2 ||W||_F: a typical row's."""
    of_worst_row: np.ndarray
    """M of the largest R_i that any row with such entries may have."""


def measure(settings: Settings) -> Measured:
    lengths = [2**i for i in (range(10, 14) if settings.quick else range(10, 18))]
    repetitions, heads = (24, 8) if settings.quick else (32, 8)
    shape = repetitions, len(lengths)
    at_gamma = {name: np.zeros((*shape, len(GAMMAS))) for name in STATISTICS}
    of = {(name, growth.name): np.zeros(shape) for name in STATISTICS for growth in GROWTHS}
    bounds = {name: Bounds(*(np.zeros((*shape, heads)) for _ in range(5))) for name in ENTRIES}
    for i in range(repetitions):
        settings.progress(f"repetition {i + 1} of {repetitions}")
        for entries, tokens in ENTRIES.items():
            generator = torch.Generator().manual_seed(settings.seed * repetitions + i)
            drawn = draw(tokens, lengths[-1], heads, generator)
            for j, n in enumerate(lengths):
                near = drawn.nearest(n)
                found = bounds[entries]
                found.largest[i, j] = near.logits.abs().amax(1)
                found.std[i, j] = near.logits.std(1, correction=0)
                found.of_row[i, j] = theory.largest_logit_bound(near.row_scale, n, DELTA)
                found.of_radius[i, j] = theory.largest_logit_bound(1, n, DELTA)
                worst = theory.worst_row_logit_scale(1, 1, D_MODEL)
                found.of_worst_row[i, j] = theory.largest_logit_bound(worst, n, DELTA)
                if tokens is not rademacher:
                    continue
                rows = SortedRows.of(near)
                for place, gamma in enumerate(GAMMAS):
                    sigma = float(theory.collapse_sigma(n)) * gamma**0.5
                    scale = (sigma / rows.std)[:, None]
                    for name, value in _statistics(rows.weights(scale)).items():
                        at_gamma[name][i, j, place] = value
                for growth in GROWTHS:
                    for name, value in _statistics(rows.weights(growth.radius(n))).items():
                        of[name, growth.name][i, j] = value
    return Measured(lengths, repetitions, heads, at_gamma, of, bounds)


def _statistics(weights: Tensor) -> dict[str, float]:
    """weights [H, n], largest first."""
    n = weights.shape[1]
    nats, few = entropy(weights), weights[:, :FEW].sum(1)
    values = (
        weights[:, 0],
        1 - theory.gamma_of_entropy(nats.clamp(min=0), n),
        nats,
        collision(weights),
        few,
        weights[:, : round(n**0.5)].sum(1),
        (weights[:, 0] > 0.5).float(),
        (few > 0.5).float(),
    )
    found = {name: float(value.mean()) for name, value in zip(STATISTICS, values, strict=True)}
    return {**found, "support": float(np.exp(found["support"]))}
