"""What the k largest weights of a row keep and lose, exactly, for any k and any scale of W.

A row is sorted once and asked at many scales, since logits are proportional to ||W||_F: that is
why `attention.need.rows_need`, which has the same definitions, is not used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_sparse.recipes.study.inputs import Rows


@dataclass(frozen=True)
class SortedRows:
    """Logits [H, n] of `Rows`, largest first, and which keys they belong to."""

    rows: Rows
    logits: Tensor
    order: Tensor

    @classmethod
    def of(cls, rows: Rows) -> SortedRows:
        return cls(rows, *rows.logits.sort(-1, descending=True))

    @property
    def std(self) -> Tensor:
        """[H], at scale 1."""
        return self.logits.std(-1, correction=0)

    def weights(self, scale: float | Tensor) -> Tensor:
        """Softmax of scale * logits, largest first [H, n]; one scale, or one of each row [H, 1]."""
        return (self.logits * scale).softmax(-1)

    def output_errors(
        self, scale: float | Tensor, budgets: Sequence[int], values: Tensor
    ) -> Tensor:
        """||o - o_S|| in root mean squares of ||v||, renormalised over the k largest S.

        Args:
            scale: factor of the logits, one or [H, 1].
            budgets: how many keys are kept, each k of them.
            values: [n, D], of mean square 1.

        Returns:
            [H, budgets]
        """
        dense = (self.rows.logits * scale).softmax(-1) @ values
        most = max(budgets)
        # Only what some budget keeps is put in order: a copy of all values for each head is large.
        kept, top = self.weights(scale)[:, None, :most], values[self.order[:, :most]]
        errors = []
        for k in budgets:
            mean = kept[..., :k] @ top[:, :k] / kept[..., :k].sum(-1, keepdim=True)
            errors.append((dense - mean[:, 0]).square().mean(-1).sqrt())
        return torch.stack(errors, -1)


def keys_needed(weights: Tensor, missed: float) -> Tensor:
    """k_eps: the fewest keys that hold 1 - missed of the mass; weights [H, n] largest first."""
    return 1 + (weights.cumsum(-1) < 1 - missed).sum(-1).clamp(max=weights.shape[-1] - 1)


def missed_mass(weights: Tensor, k: int) -> Tensor:
    """tau of the k largest, [H]; summed from the dropped ones, so that a small one is exact."""
    return weights[:, k:].sum(-1)


def collision(weights: Tensor) -> Tensor:
    """Sum of squared weights of sets renormalised to 1; of an empty set 0."""
    total = weights.sum(-1)
    return weights.square().sum(-1) / total.square().clamp(min=torch.finfo(total.dtype).tiny)


def entropy(weights: Tensor) -> Tensor:
    """In nats, [H]."""
    return torch.special.entr(weights).sum(-1)


def geometric_mean(values: Tensor) -> float:
    """Of heads, [H]."""
    return float(values.double().log().mean().exp())


def rms(errors: Tensor) -> float:
    """Root mean square of heads, [H]."""
    # A key that has all of the mass leaves no error, which has no logarithm.
    return max(float(errors.square().mean().sqrt()), 1e-9)
