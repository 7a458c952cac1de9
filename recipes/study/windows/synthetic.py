"""Windows on rows under the paper's assumptions, each with the ideal choice of its k keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_sparse.budget import Budget
from lit_sparse.recipes.study import inputs
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.reading import mixture
from lit_sparse.recipes.study.windows.cost import CONSTANT, RULES, mean_keys, solve

SHORTEST = 256
COSTS = (32, 64, 128, 256, 512)
"""Keys of the constant window that the others cost as much as."""

NORMS = ("missed mass", "output error", "relative output error")
"""tau; ||o - o_S|| / root mean square of ||v||; ||o - o_S|| / ||o||."""


@dataclass(frozen=True)
class Regime:
    """How sharp rows are.

    Args:
        name: of tables.
        sigma: standard deviation of the logits of a row of n keys, in nats.
        exponent: C of the need, by the closed forms of `theory.shapes`.
    """

    name: str
    sigma: Callable[[int], float]
    exponent: float


def _fixed(sigma: float) -> Regime:
    return Regime(f"sigma {sigma:g}", lambda n: sigma, 1.0)


def _growing(gamma: float) -> Regime:
    def sigma(n: int) -> float:
        return math.sqrt(2 * gamma * math.log(max(n, 2)))

    return Regime(f"gamma {gamma:g}", sigma, 1 - gamma)


REGIMES = (*map(_fixed, (1.0, 2.0, 3.0)), *map(_growing, (0.25, 0.5, 0.75)))


@dataclass(frozen=True)
class Errors:
    """What windows of equal cost lose.

    Args:
        lengths: of documents; equally many tokens have each.
        costs: mean keys of a query, over all of them.
        values: [norms, regimes, costs, rules, lengths, rows]; the rows of a length are evenly
            spread over the positions of its documents, and the same for everything else.
    """

    lengths: tuple[int, ...]
    costs: tuple[float, ...]
    values: np.ndarray

    def of(self, norm: str, regime: int) -> np.ndarray:
        """[costs, rules, lengths, rows]."""
        return self.values[NORMS.index(norm), regime]


def measure(settings: Settings) -> Errors:
    """Draw rows at every length, and hold every window against each."""
    longest, count = (4096, 24) if settings.quick else (16384, 128)
    documents = mixture(SHORTEST, longest)
    lengths = tuple(sorted(set(documents)))

    def cost(budget: Budget) -> float:
        return mean_keys(budget, documents)

    costs = tuple(cost(CONSTANT.make(keys)) for keys in COSTS)
    budgets = [solve(rule, cost, target) for target in costs for rule in RULES]
    generator = torch.Generator().manual_seed(settings.seed)
    found = np.empty((len(NORMS), len(REGIMES), len(budgets), len(lengths), count))
    for place, length in enumerate(lengths):
        settings.progress(f"synthetic rows of documents of {length} tokens")
        spots = torch.randperm(count, generator=generator)
        spots = (spots + torch.rand(count, generator=generator)) / count
        for row, n in enumerate((spots * length).long().add(1).tolist()):
            keys = [budget(n) for budget in budgets]
            sigmas = [regime.sigma(n) for regime in REGIMES]
            found[:, :, :, place, row] = errors(draw(n, generator), sigmas, keys)
    shape = (len(NORMS), len(REGIMES), len(costs), len(RULES), len(lengths), count)
    return Errors(lengths, costs, found.reshape(shape))


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A row of n keys: logits of standard deviation 1, descending, and values [n, D_VALUE] that do
    not depend on them, of mean square 1.
    """
    rows = inputs.draw(inputs.rademacher, n, 1, generator)
    logits, order = (rows.logits[0] / rows.row_scale).sort(descending=True)
    return logits, rows.values[order]


def errors(row: tuple[Tensor, Tensor], sigmas: Sequence[float], keys: Sequence[int]) -> Tensor:
    """All norms of the k largest of a row, the output renormalised: [norms, sigmas, keys].

    As `top_keys` defines them; here running sums serve any number of windows at once.
    """
    logits, values = row
    last = torch.tensor(keys) - 1
    scaled = torch.tensor(sigmas)[:, None] * logits
    p = scaled.softmax(-1)
    # What is dropped is summed from the least up: it may be far below the rounding of 1.
    below = p.flip(-1).cumsum(-1).flip(-1)
    missed = torch.nn.functional.pad(below, (0, 1))[:, last + 1]
    sums = (p[..., None] * values).cumsum(1)
    dense = sums[:, -1]
    kept = p.cumsum(-1)[:, last, None]
    error = (dense[:, None] - sums[:, last] / kept).norm(dim=-1)
    # All kept: the two outputs are one and the same.
    error = error.masked_fill(last == len(logits) - 1, 0.0)
    scale = math.sqrt(values.shape[1])
    return torch.stack([missed, error / scale, error / dense.norm(dim=-1)[:, None]])
