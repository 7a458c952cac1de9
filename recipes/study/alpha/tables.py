"""The tables of the study `alpha`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_sparse.recipes.study.alpha.measure import Measured
from lit_sparse.recipes.study.alpha.verdicts import above_front, above_presets, tolerance
from lit_sparse.recipes.study.findings import Table


def laws_table(found: Sequence[Measured]) -> Table:
    rows: list[list[Any]] = []
    for measured in found:
        text = measured.losses[0]
        for i in measured.of_kind("calibrated"):
            law = measured.laws[i]
            budget = law.chosen.budget
            layers = ", ".join(
                f"{layer}: {'dense' if own.exponent == 1 else f'alpha {own.alpha:.3g}'}"
                for layer, own in law.chosen.layers.items()
            )
            told = [measured.name, law.name, budget.alpha, budget.exponent, budget.floor, layers]
            rows.append([*told, float(text.keys[i]), float(text.loss[i].mean())])
    return Table(
        "calibrated",
        "Calibrated laws, and the loss difference on text, nats per token",
        (
            *("model", "target", "alpha", "C", "floor", "layers of their own"),
            *("executed keys", "loss difference"),
        ),
        rows,
    )


def distances_table(found: Sequence[Measured], seed: int) -> Table:
    rows: list[list[Any]] = []
    for measured in found:
        names = [measured.laws[i].name for i in measured.of_kind("calibrated")]
        for losses in measured.losses:
            fronts = above_front(measured, losses, seed)
            presets = above_presets(measured, losses, seed)
            for name, grid, preset in zip(names, fronts, presets, strict=True):
                rows.append(
                    [
                        *(measured.name, losses.name, name, grid.mean, grid.low, grid.high),
                        tolerance(losses),
                        *((preset.mean, preset.low, preset.high) if preset else [None] * 3),
                    ]
                )
    return Table(
        "distances",
        "How far calibrated laws lie above the front of the grid, and above that of the presets, "
        "at equal executed keys; nats per token, 95 % intervals",
        (
            *("model", "task", "target", "above grid", "low", "high", "near is"),
            *("above presets", "its low", "its high"),
        ),
        rows,
    )


def losses_table(found: Sequence[Measured]) -> Table:
    rows: list[list[Any]] = []
    for measured in found:
        for losses in measured.losses:
            for i, law in enumerate(measured.laws):
                numbers = losses.keys[i], losses.loss[i].mean(), losses.right[i]
                told = [measured.name, losses.name, law.kind, law.name, law.exponent]
                rows.append([*told, *map(float, numbers)])
    return Table(
        "losses",
        "Every law: loss difference in nats per token, share of answers right",
        ("model", "task", "kind", "law", "C", "executed keys", "loss difference", "right"),
        rows,
        in_report=False,
    )
