"""What the law k(n) = alpha n^C costs, in pairs of query and key; integrals, no rounding up.

A row's own limit (it keeps at most the t keys that it sees), floors and ceilings are left out: for
a budget as it is, sum `Budget(n)`.
"""

from __future__ import annotations

from torch import Tensor

from lit_sparse.theory.values import Value, at_least, between, positive


def sparse_cost(n: Value, alpha: Value, exponent: Value) -> Tensor:
    """Pairs of a document of n tokens, sum over t of alpha t^C: alpha n^(1+C) / (1+C)."""
    power = between("exponent", exponent, 0, 1)
    return positive("alpha", alpha) * at_least("n", n, 1) ** (1 + power) / (1 + power)


def cost_ratio(n: Value, alpha: Value, exponent: Value) -> Tensor:
    """The same over the n^2 / 2 pairs of dense causal attention: 2 alpha n^(C-1) / (1+C).

    Above 1 the law asks for more keys than there are.
    """
    return sparse_cost(n, alpha, exponent) / (at_least("n", n, 1) ** 2 / 2)


def alpha_for_share(share: Value, n_ref: Value, exponent: Value) -> Tensor:
    """The alpha whose law keeps that share of a context of n_ref tokens: share * n_ref^(1-C)."""
    power = between("exponent", exponent, 0, 1)
    return positive("share", share) * at_least("n_ref", n_ref, 1) ** (1 - power)
