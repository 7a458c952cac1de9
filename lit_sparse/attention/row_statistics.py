"""What is measured of a sampled attention row: the definitions; `probe` computes them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SINK_TOKENS = 4
"""Keys at a document's start that "without sink" leaves out, renormalising the rest."""


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of R sampled rows, float32 [R, H] but for `context`; H query heads.

    "Dense" means the softmax over all causal keys of the row's document. A learned sink of the head
    (gpt-oss) counts as a key that is always kept: it has its part in the kept mass, never in the
    dropped one. Entropies, weights, collisions and recall are of the keys alone, renormalised.
    """

    context: Tensor
    """int64 [R]: keys that each row sees, itself included (n)."""
    kl: Tensor
    """KL(p_S || p) = lse - lse_S in nats, of the kept keys S; 0 where nothing is dropped."""
    output_error: Tensor
    """||o_dense - o_sparse|| / ||o_dense||."""
    recall: Tensor
    """Mass of the far blocks that the row sees, over that of equally many best ones (the oracle of
    this row and head). Far is what is not always kept. NaN where nothing was chosen.
    """
    entropy: Tensor
    """Of the dense softmax, in nats."""
    entropy_without_sink: Tensor
    """The same without the first SINK_TOKENS keys, renormalised; 0 for rows that see no other."""
    max_weight: Tensor
    max_weight_without_sink: Tensor
    collision: Tensor
    """Sum of squared weights: its inverse is the participation ratio, 1 - it the trace of the
    softmax's Jacobian."""
    collision_without_sink: Tensor
    sink_mass: Tensor
    """Dense mass of the first SINK_TOKENS keys, and of the learned sink where there is one."""
    logit_std: Tensor
    """Standard deviation of the row's logits (sigma)."""
    logit_max: Tensor
    """Largest absolute logit."""
    logit_range: Tensor
    """Largest - smallest logit."""

    @property
    def tau(self) -> Tensor:
        """Dense softmax mass of the dropped keys, in [0, 1]."""
        return -torch.expm1(-self.kl)

    @property
    def captured_mass(self) -> Tensor:
        """Dense softmax mass of the kept keys, 1 - tau."""
        return torch.exp(-self.kl)

    @property
    def entropy_ratio(self) -> Tensor:
        """entropy / ln(n), in [0, 1]; 1 where n is 1."""
        return self._ratio(self.entropy, self.context)

    @property
    def entropy_ratio_without_sink(self) -> Tensor:
        return self._ratio(self.entropy_without_sink, self.context - SINK_TOKENS)

    @property
    def effective_support(self) -> Tensor:
        """exp(entropy): the number of equally weighted keys of the same entropy."""
        return self.entropy.exp()

    @property
    def participation(self) -> Tensor:
        """1 / sum p^2, in keys."""
        return 1 / self.collision

    @property
    def jacobian_trace(self) -> Tensor:
        """1 - sum p^2: 0 where the softmax passes no gradient."""
        return 1 - self.collision

    @property
    def gamma(self) -> Tensor:
        """sigma^2 / (2 ln n): collapse of Gaussian logits at 1 (random-energy model)."""
        return self.logit_std**2 / (2 * self.context.clamp(min=2).log()[:, None])

    @property
    def gamma_of_entropy(self) -> Tensor:
        """1 - H / ln n: what gamma would be, were the logits Gaussian."""
        return 1 - self.entropy_ratio

    @staticmethod
    def _ratio(entropy: Tensor, keys: Tensor) -> Tensor:
        log_n = keys.clamp(min=2).to(entropy.dtype).log()[:, None]
        return torch.where(keys[:, None] > 1, entropy / log_n, 1.0)


STATISTICS = tuple(f.name for f in fields(RowStatistics))[1:]
"""Names of the [R, H] fields of `RowStatistics`."""
