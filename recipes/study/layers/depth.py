"""What depth does: fits of every layer and head, and how they change from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lit_sparse.calibration import HeadFits, Needs, fit_heads
from lit_sparse.recipes.study.layers.measure import Measured
from lit_sparse.recipes.study.stats import Estimate

MAIN = ("all", 0.05)
"""The view and the missed mass that are meant where nothing else is said."""


@dataclass(frozen=True)
class Depth:
    """The fits of one model on texts of one kind."""

    measured: Measured
    fits: dict[tuple[str, float], HeadFits]
    """By view and missed mass."""
    gaussian_needs: Needs
    """Of `gaussian_needs`, for MAIN."""
    gaussian: HeadFits
    """Their fits."""

    @property
    def main(self) -> HeadFits:
        return self.fits[MAIN]

    @property
    def share(self) -> Tensor:
        """[L, H]: k / n of the longest texts, mean over rows."""
        return self._share(self.measured.needs[MAIN])

    @property
    def gaussian_share(self) -> Tensor:
        """[L, H]: the same of the Gaussian logits."""
        return self._share(self.gaussian_needs)

    def _share(self, needs: Needs) -> Tensor:
        longest = self.measured.lengths == self.measured.lengths.max()
        return (needs.keys[longest] / needs.context[longest][:, None, None]).mean(0)

    def sublinear(self, view: str = "all", missed: float = 0.05) -> Tensor:
        """bool [L, H]: the 95 % interval of C lies below 1."""
        return self.fits[view, missed].exponent_high < 1


def fit(measured: Measured, samples: int, seed: int) -> Depth:
    """k = alpha n^C for every head, view and missed mass; `samples` of the bootstrap."""

    def of(needs: Needs) -> HeadFits:
        return fit_heads(needs, "keys", samples=samples, seed=seed)

    fits = {key: of(needs) for key, needs in measured.needs.items()}
    twin = gaussian_needs(measured.needs[MAIN], seed)
    return Depth(measured, fits, twin, of(twin))


def gaussian_needs(needs: Needs, seed: int) -> Needs:
    """The same rows with independent Gaussian logits of the same standard deviation.

    At a fixed deviation they need a fixed share of many keys (`theory.gaussian_keys_fraction`); of
    few, as here, the fitted C is below 1 by as much as this shows.
    """
    drawn = torch.Generator().manual_seed(seed)
    keys = torch.empty_like(needs.keys)
    for row, n in enumerate(needs.context.tolist()):
        noise = torch.randn(*keys.shape[1:], n, generator=drawn)
        weight = (needs.logit_std[row, ..., None] * noise).softmax(-1).sort(-1).values
        keys[row] = n - (weight.cumsum(-1) <= needs.missed).sum(-1)
    return replace(needs, keys=keys, block_keys=keys)


def change_over_depth(values: Tensor, seed: int = 0, draws: int = 2000) -> Estimate:
    """What the straight line through [L, H] gains from the first layer to the last, L >= 2.

    The interval is of a bootstrap over the heads of each layer: how much heads differ, and with
    that how well each is measured.
    """
    data = values.double().numpy()
    layers, heads = data.shape
    place = np.linspace(-0.5, 0.5, layers)
    weight = place / (place @ place)
    picks = np.random.default_rng(seed).integers(heads, size=(draws, layers, heads))
    means = np.take_along_axis(data[None], picks, axis=2).mean(2)
    low, high = np.percentile(means @ weight, [2.5, 97.5])
    return Estimate(float(data.mean(1) @ weight), float(low), float(high))
