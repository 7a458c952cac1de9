"""Synthetic attention rows under the assumptions of arXiv 2404.02690.

Tokens x_j have independent entries |x| <= B = 1, a head has W = W_Q W_K^T / sqrt(d_head) of a set
||W||_F, so that R = B^2 ||W||_F is what is asked; logits are s_j = x_i^T W x_j. Only the last row
of a context is made, in several heads: nothing of size n x n exists. `relaxed` has tokens that
break the assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_sparse.theory import product_norm

D_MODEL, D_HEAD, D_VALUE = 128, 64, 16

Tokens = Callable[[int, int, torch.Generator], Tensor]
"""(n, entries, generator) -> float32 [n, entries], of mean 0 and about the same mean square for
every n."""


def rademacher(n: int, entries: int, generator: torch.Generator) -> Tensor:
    """-1 or 1: the largest variance that |x| <= 1 allows, so logits of standard deviation R."""
    signs = torch.randint(2, (n, entries), generator=generator, dtype=torch.int8)
    return signs.float().mul_(2).sub_(1)


def uniform(n: int, entries: int, generator: torch.Generator) -> Tensor:
    """In [-1, 1]: logits of standard deviation R / 3."""
    return torch.rand(n, entries, generator=generator).mul_(2).sub_(1)


def projections(
    heads: int, norm: float, generator: torch.Generator, d_model: int = D_MODEL
) -> tuple[Tensor, Tensor]:
    """Gaussian W_Q, W_K [heads, d_model, D_HEAD] with ||W_Q W_K^T||_F / sqrt(D_HEAD) = norm."""
    w_q, w_k = torch.randn(2, heads, d_model, D_HEAD, generator=generator)
    factor = (norm * D_HEAD**0.5 / product_norm(w_q, w_k)).sqrt().float()[:, None, None]
    return w_q * factor, w_k * factor


@dataclass(frozen=True)
class Rows:
    """The last row of n tokens in H heads, at ||W||_F = 1; its logits are proportional to that."""

    logits: Tensor
    """[H, n]"""
    row_scale: Tensor
    """[H], ||W^T x_i||_2 of the row's own token: R_i is B times as much."""
    largest_entry: float
    """B, as drawn."""
    values: Tensor
    """[n, D_VALUE], tokens of the same kind that the scores do not depend on; mean square 1."""
    linear_values: Tensor
    """[n, D_VALUE], x_j W_V: of the same tokens as the scores, as in a model; mean square 1."""

    def nearest(self, n: int) -> Rows:
        """The same rows where only the last n keys are seen: what differs between lengths is n."""
        return replace(
            self,
            logits=self.logits[:, -n:],
            values=self.values[-n:],
            linear_values=self.linear_values[-n:],
        )


def draw(tokens: Tokens, n: int, heads: int, generator: torch.Generator) -> Rows:
    """Tokens, weights and values of one context of n tokens."""
    drawn = tokens(n, D_MODEL + D_VALUE, generator)
    x, values = drawn[:, :D_MODEL], drawn[:, D_MODEL:]
    w_q, w_k = projections(heads, 1.0, generator)
    # x_i^T W: the product of the weights is not needed.
    queries = (w_k @ (w_q.mT @ x[-1])[..., None])[..., 0] / D_HEAD**0.5
    w_v = torch.randn(D_MODEL, D_VALUE, generator=generator)
    return Rows(
        queries @ x.T,
        queries.norm(dim=1),
        float(x.abs().max()),
        _unit(values),
        _unit(x @ w_v),
    )


@dataclass(frozen=True)
class Growth:
    """How R depends on n.

    Args:
        name: as tables say it.
        radius: n -> R.
        gamma: what R^2 / (2 ln n) tends to, of tokens whose logits have the standard deviation R.
    """

    name: str
    radius: Callable[[int], float]
    gamma: float

    @classmethod
    def fixed(cls, radius: float) -> Growth:
        return cls(f"R = {radius:g}", lambda n: radius, 0.0)

    @classmethod
    def at_gamma(cls, gamma: float) -> Growth:
        """Like sqrt(ln n), at one temperature of the random-energy model."""
        factor = "" if gamma == 0.5 else f"{2 * gamma:g} "
        return cls(f"R = sqrt({factor}ln n)", lambda n: math.sqrt(2 * gamma * math.log(n)), gamma)

    @classmethod
    def slow(cls) -> Growth:
        """Without bound, and o(sqrt(ln n))."""
        return cls("R = (ln n)^(1/4)", lambda n: math.log(n) ** 0.25, 0.0)

    @classmethod
    def logarithmic(cls, factor: float) -> Growth:
        """Like ln n: faster than sqrt(ln n)."""
        return cls(f"R = {factor:g} ln n", lambda n: factor * math.log(n), math.inf)

    @classmethod
    def power(cls, factor: float, exponent: float) -> Growth:
        """Much faster than sqrt(ln n)."""
        return cls(f"R = {factor:g} n^{exponent:g}", lambda n: factor * n**exponent, math.inf)


def _unit(values: Tensor) -> Tensor:
    return values / values.square().mean().sqrt()
