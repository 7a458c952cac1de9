"""What is measured: each prediction over what is found, for tokens that break an assumption."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse import theory
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.inputs import Tokens, draw, rademacher, uniform
from lit_sparse.recipes.study.relaxed import (
    correlated,
    heavy,
    outliers,
    repeated,
    shared_mean,
    topics,
)
from lit_sparse.recipes.study.stats import Estimate, crossing, log_slopes, mean_of
from lit_sparse.recipes.study.top_keys import (
    SortedRows,
    collision,
    geometric_mean,
    keys_needed,
    missed_mass,
    rms,
)

MISSED, FEW = 0.05, 16
SIGMA, GAMMA = 2.0, 0.5
"""Of the rows whose keys are counted: a fixed sigma, and a sigma that grows with n."""
GAMMAS = (*(i / 20 for i in range(1, 25)), 1.4, 1.7, 2, 3, 5, 8)

NONE = "-1 or 1"
FAMILIES: Mapping[str, Mapping[str, Tokens]] = {
    "bounded entries": {"uniform": uniform},
    "correlated neighbours, rho": {f"{rho:g}": correlated(rho) for rho in (0.5, 0.9, 0.97, 0.99)},
    "shared mean, share": {f"{share:g}": shared_mean(share) for share in (0.1, 0.5, 0.9)},
    "topics, share": {f"{share:g}": topics(share) for share in (0.1, 0.3, 0.6, 0.9)},
    "heavy tails, df": {
        "Gaussian": heavy(math.inf),
        **{str(df): heavy(df) for df in (10, 5, 3, 2)},
    },
    "outlier features, scale": {f"{scale}x": outliers(scale) for scale in (3, 10, 30)},
    "repeated tokens, vocabulary": {str(size): repeated(size) for size in (8192, 2048, 512, 128)},
}

KEYS, EXPONENT, COLLAPSE = "k_eps", "C", "collapse gamma"
SLOPE, LEVEL = "output slope", "output error"
PREDICTIONS = (KEYS, EXPONENT, COLLAPSE, SLOPE, LEVEL)


@dataclass(frozen=True)
class Case:
    """One kind of tokens: measured / predicted of each of PREDICTIONS, and the scale of logits."""

    family: str
    level: str
    ratios: Mapping[str, Estimate]
    r_over_sigma: Estimate
    """B^2 ||W||_F over the measured standard deviation of a row's logits; B as drawn."""


@dataclass(frozen=True)
class Measured:
    lengths: Sequence[int]
    repetitions: int
    heads: int
    base: Case
    cases: Sequence[Case]


def measure(settings: Settings) -> Measured:
    lengths = [2**i for i in (range(10, 14) if settings.quick else range(10, 16))]
    repetitions, heads = (8, 8) if settings.quick else (16, 8)
    plan = _Plan(lengths, repetitions, heads, settings.seed)
    settings.progress("under the assumptions")
    collapse, base = plan.case("none", NONE, rademacher, None)
    cases = []
    for family, levels in FAMILIES.items():
        settings.progress(family)
        for level, tokens in levels.items():
            cases.append(plan.case(family, level, tokens, collapse)[1])
    return Measured(lengths, repetitions, heads, base, cases)


@dataclass(frozen=True)
class _Plan:
    lengths: Sequence[int]
    repetitions: int
    heads: int
    seed: int

    def case(
        self, family: str, level: str, tokens: Tokens, collapse: float | None
    ) -> tuple[float, Case]:
        """The gamma at which it collapses, and the case; `collapse` is that of the assumptions."""
        shape = self.repetitions, len(self.lengths)
        names = "keys", "growing", "expected", "output", "formula"
        found = {name: np.zeros(shape) for name in names}
        few, scale = np.zeros((self.repetitions, len(GAMMAS))), np.zeros(self.repetitions)
        for i in range(self.repetitions):
            generator = torch.Generator().manual_seed(self.seed * self.repetitions + i)
            drawn = draw(tokens, self.lengths[-1], self.heads, generator)
            for j, n in enumerate(self.lengths):
                rows = SortedRows.of(drawn.nearest(n))
                for name, value in _measured(rows, n).items():
                    found[name][i, j] = value
            few[i] = _few_hold(rows, self.lengths[-1])
            scale[i] = drawn.largest_entry**2 / float(rows.std.mean())
        gamma = _collapse(few)
        expected = gamma.mean if collapse is None else collapse
        share = float(theory.gaussian_keys_fraction(SIGMA, MISSED))
        slopes = [log_slopes(self.lengths, found[name]) for name in names]
        ratios = {
            KEYS: mean_of(found["keys"][:, -1] / (share * self.lengths[-1])),
            EXPONENT: mean_of(slopes[1] / slopes[2]),
            COLLAPSE: Estimate(*(x / expected for x in (gamma.mean, gamma.low, gamma.high))),
            SLOPE: mean_of(slopes[3] / slopes[4].mean()),
            LEVEL: mean_of(found["output"][:, -1] / found["formula"][:, -1]),
        }
        return gamma.mean, Case(family, level, ratios, mean_of(scale))


def _measured(rows: SortedRows, n: int) -> dict[str, float]:
    """Of rows whose logits are scaled to the sigma that is asked."""
    k = round(n**0.5)
    flat, fixed = rows.weights(_scale(rows, 1)), rows.weights(_scale(rows, SIGMA))
    sigma = float(theory.collapse_sigma(n)) * GAMMA**0.5
    formula = theory.output_error_of_independent_values(
        missed_mass(flat, k).clamp(max=1), collision(flat[:, :k]), collision(flat[:, k:])
    )
    output = rows.output_errors(_scale(rows, 1), [k], rows.rows.values)[:, 0]
    return {
        "keys": geometric_mean(keys_needed(fixed, MISSED)),
        "growing": geometric_mean(keys_needed(rows.weights(_scale(rows, sigma)), MISSED)),
        "expected": n * float(theory.gaussian_keys_fraction(sigma, MISSED)),
        "output": rms(output),
        "formula": rms(formula),
    }


def _few_hold(rows: SortedRows, n: int) -> list[float]:
    """By gamma, the share of rows whose FEW largest keys have more than half of the mass."""
    critical = float(theory.collapse_sigma(n))
    masses = [rows.weights(_scale(rows, critical * g**0.5))[:, :FEW].sum(1) for g in GAMMAS]
    return [float((mass > 0.5).float().mean()) for mass in masses]


def _collapse(few: np.ndarray) -> Estimate:
    """The gamma from which half of the rows are collapsed, of shares [repetitions, GAMMAS]; 0 where
    they are at the least gamma already, infinite where they are not at the largest."""
    found = crossing(GAMMAS, few)
    if not math.isnan(found.mean):
        return found
    return Estimate(*[0.0 if few[:, 0].mean() > 0.5 else math.inf] * 3)


def _scale(rows: SortedRows, sigma: float) -> Tensor:
    """[H, 1]"""
    return (sigma / rows.std)[:, None]
