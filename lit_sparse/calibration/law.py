"""From the laws of single heads to the budget of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_sparse.budget import Budget
from lit_sparse.calibration.fit import PROPORTIONAL, HeadFits

# What a layer may need above the law of all before it has its own alpha.
_SLACK = 1.1

# Width of an interval of C from which it says little.
_UNKNOWN = 0.5

# Share of the heads that may look odd by chance.
_CHANCE = 0.05


@dataclass(frozen=True)
class ChosenLaw:
    """A budget for all layers, other ones for some, and what a user should know about them."""

    budget: Budget
    layers: Mapping[int, Budget] = field(default_factory=dict)
    """Layers with a larger alpha, or `Budget.dense()`."""
    warnings: tuple[str, ...] = ()
    """Sentences, the gravest first."""

    def of(self, layer: int) -> Budget:
        return self.layers.get(layer, self.budget)

    @property
    def dense(self) -> bool:
        """Whether no layer drops anything."""
        return all(b == Budget.dense() for b in (self.budget, *self.layers.values()))

    def scaled(self, factor: float) -> ChosenLaw:
        """Every alpha times a factor; dense layers stay dense."""
        layers = {layer: budget.scaled(factor) for layer, budget in self.layers.items()}
        return ChosenLaw(self.budget.scaled(factor), layers, self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """The `budget` and `layers` of a configuration's `sparse_attention`."""
        layers = {layer: budget.to_dict() for layer, budget in self.layers.items()}
        return {"budget": self.budget.to_dict(), "layers": layers}


def choose_law(
    fits: HeadFits,
    *,
    floor: int | None = None,
    sink: int = 64,
    local: float = 0.25,
    late: float = 0.1,
    block: int = 64,
) -> ChosenLaw:
    """One law that satisfies nine heads of ten, and exceptions for the layers that need more.

    C is that of the upper-quartile head, alpha the 90th percentile of k_ref n_ref^-C. A layer stays
    dense where the need of its upper-quartile head is proportional to the context: no sublinear
    budget is enough for it. One whose 90th-percentile head needs a tenth more than the law, at
    n_ref or at the longest measured context, has its own alpha.

    Args:
        fits: of `fit_heads`.
        floor: fewest keys; None: those of the law at the shortest measured context, in whole
            blocks.
        sink, local, late: as in `Budget`.
        block: keys of a block.
    """
    count = len(fits.layers)
    # Places among the measured layers; numbers are what is said and written.
    dense = [
        place
        for place, verdicts in enumerate(fits.verdict)
        if verdicts.count("proportional") >= len(verdicts) / 4
    ]
    sparse = [place for place in range(count) if place not in dense]
    warnings = [_proportional(_numbers(fits, dense), count)] if dense else []
    if not sparse:
        return ChosenLaw(Budget.dense(), {}, tuple(warnings))

    exponent = round(float(torch.quantile(fits.exponent[sparse], 0.75)), 2)
    factor = fits.k_ref[sparse] * fits.n_ref**-exponent
    alpha = _rounded_up(float(torch.quantile(factor, 0.9)))
    if floor is None:
        shortest = Budget(alpha, exponent, floor=0)(fits.shortest)
        floor = -(-shortest // block) * block
    law = Budget(alpha, exponent, floor=floor, sink=sink, local=local, late=late)

    layers = {layer: Budget.dense() for layer in _numbers(fits, dense)}
    longest = fits.keys_at(fits.longest)[sparse] * fits.longest**-exponent
    needed = torch.quantile(torch.maximum(factor, longest), 0.9, dim=1)
    for layer, own in zip(_numbers(fits, sparse), needed.tolist(), strict=True):
        if own > _SLACK * alpha:
            layers[layer] = replace(law, alpha=_rounded_up(own))
    chosen = ChosenLaw(law, dict(sorted(layers.items())))
    idle = [
        layer
        for layer in _numbers(fits, sparse)
        if chosen.of(layer)(fits.longest) >= 0.9 * fits.longest
    ]
    if idle:
        warnings.append(
            f"The budget of {_layers(idle, count)} keeps 90 % and more of the keys at the longest "
            f"measured context, {fits.longest} tokens: sparse attention saves nothing there."
        )
    return ChosenLaw(chosen.budget, chosen.layers, tuple(warnings + _doubts(fits, sparse)))


def _doubts(fits: HeadFits, sparse: Sequence[int]) -> list[str]:
    """Sentences on what speaks against the laws of more heads than chance explains."""
    odd = torch.tensor([[v == "no power law" for v in layer] for layer in fits.verdict])
    drifting = fits.convex & (fits.exponent < PROPORTIONAL)
    unknown = fits.exponent_high - fits.exponent_low > _UNKNOWN
    found = []
    for heads, what in (
        (odd, "A power law does not fit {}: take the budget for the measured contexts only."),
        (
            drifting,
            "The need of {} grows faster at longer contexts, its C drifts towards 1: do not use "
            f"the budget beyond {2 * fits.longest} tokens, twice the longest measured context.",
        ),
        (
            unknown,
            f"C of {{}} is known to no better than {_UNKNOWN / 2:g} either way: measure more "
            "documents.",
        ),
    ):
        own = heads[list(sparse)]
        if own.double().mean() > _CHANCE:
            where = _numbers(fits, [place for place in sparse if heads[place].any()])
            count = f"{int(own.sum())} of {own.numel()} heads"
            found.append(what.format(f"{count} ({_layers(where, len(heads))})"))
    return found


def _proportional(dense: Sequence[int], layers: int) -> str:
    them, stays = ("it", "stays") if len(dense) == 1 else ("them", "stay")
    return (
        f"In {_layers(dense, layers)} the need of a quarter of the heads, or more, is proportional "
        f"to the context: no sublinear budget is written for {them}, which {stays} dense."
    )


def _numbers(fits: HeadFits, places: Sequence[int]) -> list[int]:
    return [fits.layers[place] for place in places]


def _layers(numbers: Sequence[int], count: int) -> str:
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) == count:
        return f"all {count} layers"
    return f"layers {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _rounded_up(value: float) -> float:
    """To three digits."""
    digit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / digit - 1e-9) * digit:.3g}")
