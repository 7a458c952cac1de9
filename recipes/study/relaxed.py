"""Tokens that break the assumptions of `inputs`, step by step; entries of mean square 1.

Each function takes how far it goes and gives `Tokens`. What is drawn last (the values) is of the
same kind as what is drawn first (the tokens of the scores), and shares its positions: neighbours,
topics and repetitions are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_sparse.recipes.study.inputs import D_MODEL, Tokens, rademacher

TOPICS, OUTLIERS = 16, 4


def correlated(rho: float) -> Tokens:
    """AR(1) over positions: x_j = rho x_(j-1) + sqrt(1 - rho^2) u_j. Bounded, but not independent
    from one key to the next."""

    def tokens(n: int, entries: int, generator: torch.Generator) -> Tensor:
        x = rademacher(n, entries, generator)
        x[1:] *= (1 - rho**2) ** 0.5
        step = 1
        # The sum over rho^i x_(j-i) is the product over 1 + rho^s shifted by s = 1, 2, 4, ...
        while step < n and rho**step > 1e-7:
            x[step:] += rho**step * x[:-step].clone()
            step *= 2
        return x

    return tokens


def shared_mean(share: float) -> Tokens:
    """All tokens have a common part, of that share of their mean square."""

    def tokens(n: int, entries: int, generator: torch.Generator) -> Tensor:
        common = rademacher(1, entries, generator)
        return share**0.5 * common + (1 - share) ** 0.5 * rademacher(n, entries, generator)

    return tokens


def topics(share: float) -> Tokens:
    """Each token has the part of one of TOPICS topics, of that share of its mean square."""

    def tokens(n: int, entries: int, generator: torch.Generator) -> Tensor:
        centres = rademacher(TOPICS, entries, generator)
        topic = torch.randint(TOPICS, (n,), generator=generator)
        own = rademacher(n, entries, generator)
        return share**0.5 * centres[topic] + (1 - share) ** 0.5 * own

    return tokens


def heavy(df: float) -> Tokens:
    """Entries of Student's t (Bailey 1994, the polar method); infinity: Gaussian. Not bounded, and
    without a variance up to df = 2: the mean square is 1 as drawn."""

    def tokens(n: int, entries: int, generator: torch.Generator) -> Tensor:
        if math.isinf(df):
            return torch.randn(n, entries, generator=generator)
        # float64: the smallest u make the largest entries.
        u, v = torch.rand(2, n, entries, generator=generator, dtype=torch.float64)
        x = (df * ((1 - u) ** (-2 / df) - 1)).sqrt() * (2 * math.pi * v).cos()
        return (x / x.square().mean().sqrt()).float()

    return tokens


def outliers(scale: float) -> Tokens:
    """OUTLIERS features of the scores' tokens are `scale` times the others."""

    def tokens(n: int, entries: int, generator: torch.Generator) -> Tensor:
        x = rademacher(n, entries, generator)
        x[:, :OUTLIERS] *= scale
        return x / (1 + OUTLIERS / D_MODEL * (scale**2 - 1)) ** 0.5

    return tokens


def repeated(vocabulary: int) -> Tokens:
    """Each token is one of so many."""

    def tokens(n: int, entries: int, generator: torch.Generator) -> Tensor:
        distinct = rademacher(vocabulary, entries, generator)
        return distinct[torch.randint(vocabulary, (n,), generator=generator)]

    return tokens
