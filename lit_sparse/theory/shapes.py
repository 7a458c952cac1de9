"""Closed forms for rows of known shape, to compare measurements with. All reconstructed.

Gaussian logits, the random-energy model (Gaussian logits whose sigma grows with n), and weights
that fall as a power of their rank. Norm: the dropped softmax mass of the largest k of n keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse.theory.values import Value, at_least, share


def gaussian_keys_fraction(sigma: Value, missed: Value) -> Tensor:
    """k / n that misses the mass `missed`, for Gaussian logits of standard deviation sigma (nats).

    Phi_c(sigma + Phi^-1(missed)), for many keys: good to .005 for sigma <= 2. It does not depend
    on n: logits of a fixed sigma need a fixed share of the context, C = 1.
    """
    quantile = torch.special.ndtri(share("missed", missed))
    return torch.special.ndtr(-(at_least("sigma", sigma, 0) + quantile))


def collapse_sigma(n: Value) -> Tensor:
    """sqrt(2 ln n): the standard deviation of Gaussian logits from which a few of n keys have all
    the mass (random-energy model)."""
    return (2 * at_least("n", n, 1).log()).sqrt()


def collapse_length(sigma: Value) -> Tensor:
    """e^(sigma^2 / 2): Gaussian logits of a fixed sigma are collapsed *below* this many keys."""
    return (at_least("sigma", sigma, 0) ** 2 / 2).exp()


def gamma(sigma: Value, n: Value) -> Tensor:
    """sigma^2 / (2 ln n), the temperature of the random-energy model: 1 and above is collapsed."""
    return at_least("sigma", sigma, 0) ** 2 / (2 * at_least("n", n, 2).log())


def gamma_of_entropy(entropy: Value, n: Value) -> Tensor:
    """1 - H / ln n: the gamma that Gaussian logits of this entropy (nats) would have.

    Where it disagrees with `gamma` the logits are not Gaussian, and the entropy is to be trusted.
    """
    return 1 - at_least("entropy", entropy, 0) / at_least("n", n, 2).log()


def rem_exponent(gamma: Value) -> Tensor:
    """C* = max(0, 1 - gamma): e^H ~ n^C* keys carry the mass of n Gaussian logits."""
    return (1 - at_least("gamma", gamma, 0)).clamp(min=0)


def rem_entropy(gamma: Value, n: Value) -> Tensor:
    """(1 - gamma) ln n nats, 0 once collapsed: to leading order in ln n."""
    return rem_exponent(gamma) * at_least("n", n, 1).log()


def rem_max_weight(gamma: Value, n: Value) -> Tensor:
    """n^-(1 - sqrt(gamma))^2, 1 once collapsed: to leading order in ln n."""
    distance = (1 - at_least("gamma", gamma, 0).sqrt()).clamp(min=0)
    return (-(distance**2) * at_least("n", n, 1).log()).exp()


def rank_power_keys(n: Value, a: Value, missed: Value) -> Tensor:
    """Keys that miss the mass `missed` where the r-th largest weight is proportional to r^-a.

    For n large: a < 1 a share of the context, n (1 - missed)^(1 / (1-a)); a = 1 n^(1 - missed);
    a > 1 a constant, (missed (a-1) zeta(a))^(-1 / (a-1)) - 1/2. Within [1, n]. Near a = 1, where
    n^|1-a| is not large, each case is far from its limit.
    """
    keys, power = at_least("n", n, 1), at_least("a", a, 0)
    eps = share("missed", missed)
    # Each case is computed everywhere, with a power that it can take, and chosen where it holds.
    below, above = torch.where(power < 1, power, 0.0), torch.where(power > 1, power, 2.0)
    proportional = keys * (1 - eps) ** (1 / (1 - below))
    scale = eps * (above - 1) * torch.special.zeta(above, torch.ones_like(above))
    constant = scale ** (-1 / (above - 1)) - 0.5
    found = torch.where(
        power < 1, proportional, torch.where(power > 1, constant, keys ** (1 - eps))
    )
    return torch.minimum(found.clamp(min=1), keys)
