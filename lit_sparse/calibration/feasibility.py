"""Whether a model's logits can meet a budget at all: the range that it requires, and theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_sparse.calibration.fit import HeadFits
from lit_sparse.calibration.law import ChosenLaw
from lit_sparse.theory import required_logit_range


@dataclass(frozen=True)
class Feasibility:
    """Ranges of logits in nats, of the keys that are not always kept."""

    lengths: tuple[int, ...]
    required: Tensor
    """float64 [lengths, layers]: least range with which any choice of k(n) keys can miss so little;
    0 where the budget keeps every key. Necessary, not sufficient.
    """
    measured: Tensor
    """float64 [lengths, layers, heads]: the mean range, along its straight line in ln n."""
    layers: tuple[int, ...]
    """Number of each layer in the model."""

    @property
    def infeasible(self) -> Tensor:
        """bool [lengths, layers, heads]."""
        return self.required[..., None] > self.measured

    @property
    def sentences(self) -> list[str]:
        """One for every length at which the logits of some heads are too narrow."""
        found = []
        for n, required, measured, bad in zip(
            self.lengths, self.required, self.measured, self.infeasible, strict=True
        ):
            if not bad.any():
                continue
            place, head = divmod(int((required[:, None] - measured).argmax()), bad.shape[1])
            found.append(
                f"At {n} tokens the logits of {int(bad.sum())} of {bad.numel()} heads are too "
                "narrow for the budget, whatever keys are chosen: layer "
                f"{self.layers[place]} head {head} is furthest off, it would need a range of "
                f"{float(required[place]):.1f} nats and has {float(measured[place, head]):.1f}."
            )
        return found


def feasibility(
    fits: HeadFits, law: ChosenLaw, lengths: Sequence[int], missed: float | None = None
) -> Feasibility:
    """The range of logits that a law requires at some lengths, beside the measured one.

    Args:
        fits: of `fit_heads`.
        law: any; `ChosenLaw(Budget.preset("balanced"))` for a budget that was not calibrated.
        lengths: contexts n; beyond the measured ones the range is extrapolated.
        missed: share of the mass that may be missed; None: that of the measurement.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"feasibility: lengths must be positive, got {list(lengths)}")
    n = torch.tensor(list(lengths))
    k = torch.stack([law.of(layer)(n) for layer in fits.layers], dim=1)
    rest = (n - fits.always).clamp(min=1)[:, None]
    # Always-kept keys are no choice: the others have to do with what is left of the budget.
    chosen = (k - fits.always).clamp(min=1)
    missed = fits.missed if missed is None else missed
    required = required_logit_range(rest.double(), torch.minimum(chosen, rest).double(), missed)
    away = (n.double() / fits.n_ref).log()[:, None, None]
    measured = (fits.logit_range + fits.logit_range_slope * away).clamp(min=0)
    return Feasibility(tuple(lengths), required, measured, fits.layers)
