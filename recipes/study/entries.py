"""What enters the attention of a layer, against what the theory assumes of it: bounded, independent
entries of mean 0 (arXiv 2404.02690)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import normalize

from lit_sparse.recipes.inspect.measure import Inputs


@dataclass
class Entries(Inputs):
    """Of the inputs [tokens, d_model] of all texts; the last three are means over texts."""

    _powers: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _cosines: list[float] = field(default_factory=list)
    _dimensions: list[float] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """x [batch, tokens, d_model]"""
        super().add(x)
        x = x.double()
        self._powers = [self._powers[i] + x.pow(3 + i).sum().item() for i in range(2)]
        for text in x:
            self._cosines.append(token_cosine(text))
            self._dimensions.append(dimension_share(text))

    @property
    def largest_over_rms(self) -> float:
        """B in units of the root mean square: boundedness."""
        return self.largest / self.rms

    @property
    def excess_kurtosis(self) -> float:
        """Of all entries together: 0 for normal ones, large where a few features are."""
        count = self.tokens * self.total.numel()
        mean, square = self.total.sum().item() / count, self.rms**2
        third, fourth = (power / count for power in self._powers)
        central = fourth - 4 * mean * third + 6 * mean**2 * square - 3 * mean**4
        return central / (square - mean**2) ** 2 - 3

    @property
    def token_cosine(self) -> float:
        return sum(self._cosines) / len(self._cosines)

    @property
    def dimension_share(self) -> float:
        return sum(self._dimensions) / len(self._dimensions)


def normal_largest(entries: Entries) -> float:
    """sqrt(2 ln N): about the largest of as many normal entries of root mean square 1."""
    return math.sqrt(2 * math.log(entries.tokens * entries.total.numel()))


def token_cosine(x: Tensor) -> float:
    """Mean cosine of two different tokens of x [tokens, d_model]."""
    count = len(x)
    together = normalize(x, dim=-1).sum(0).square().sum().item()
    return (together - count) / (count * (count - 1))


def dimension_share(x: Tensor) -> float:
    """Effective dimensions of x [tokens, d_model], as a share of those of as many tokens with
    independent entries of one variance: 1 for independent ones, near 0 where few directions vary.

    Effective dimensions are the participation ratio of the variances along the principal axes,
    (sum)^2 / sum of squares.
    """
    count, width = x.shape
    centred = x - x.mean(0)
    # The smaller of the two Gram matrices has the same spectrum.
    gram = centred @ centred.T if count < width else centred.T @ centred
    ratio = gram.trace().square() / gram.square().sum()
    return ratio.item() * (1 / (count - 1) + 1 / width)
