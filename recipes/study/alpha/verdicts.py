"""What the numbers say of the calibrated laws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lit_sparse.recipes.study.alpha.measure import TEXT, Losses, Measured
from lit_sparse.recipes.study.alpha.pareto import distances
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.stats import Estimate, resampled_means

NEAR = 0.01
"""Share of the dense loss, or nats per token where that is more: as near as makes no difference."""

KNOWN = 0.5
"""Share of a task's prompts that a dense model must answer for its loss to say something."""


def tolerance(losses: Losses) -> float:
    """What counts as near, nats per token."""
    return NEAR * max(losses.dense_loss, 1.0)


def counts(losses: Losses) -> bool:
    """Whether the dense model can do the task."""
    return losses.name == TEXT or losses.dense_right >= KNOWN


def above_front(measured: Measured, losses: Losses, seed: int) -> list[Estimate]:
    """How far each calibrated law lies above the front of the grid, nats per token."""
    return _above(measured, losses, "grid", seed)


def above_presets(measured: Measured, losses: Losses, seed: int) -> list[Estimate | None]:
    """The same above the presets' own front; None at costs that these do not reach."""
    reach = losses.keys[measured.of_kind("preset")]
    keys = losses.keys[measured.of_kind("calibrated")]
    found = _above(measured, losses, "preset", seed)
    return [
        estimate if reach.min() <= own <= reach.max() else None
        for own, estimate in zip(keys, found, strict=True)
    ]


def _above(measured: Measured, losses: Losses, kind: str, seed: int) -> list[Estimate]:
    own, others = measured.of_kind("calibrated"), measured.of_kind(kind)
    # The first draw is what was measured.
    errors = np.concatenate(
        [losses.loss.mean(1, keepdims=True), resampled_means(losses.loss, seed)], axis=1
    )
    found = distances(losses.keys[others], errors[others], losses.keys[own], errors[own])
    lows, highs = np.percentile(found[:, 1:], [2.5, 97.5], axis=1)
    means = found[:, 0].tolist()
    return [Estimate(*one) for one in zip(means, lows.tolist(), highs.tolist(), strict=True)]


def on_the_front(found: Sequence[Measured], seed: int) -> list[Verdict]:
    """One verdict for each task."""
    return [_front_verdict(found, place, seed) for place in range(len(found[0].losses))]


def _front_verdict(found: Sequence[Measured], place: int, seed: int) -> Verdict:
    name = found[0].losses[place].name
    near, total, parts, unknown = 0, 0, [], []
    for measured in found:
        losses = measured.losses[place]
        estimates = above_front(measured, losses, seed)
        parts.append(f"{measured.name}: {_listed(measured, losses, estimates)}")
        if not counts(losses):
            unknown.append(measured.name)
            continue
        total += len(estimates)
        near += sum(e.low <= 0 or e.mean <= tolerance(losses) for e in estimates)
    outcome = Outcome.of(near == total and total > 0 and not unknown, near > 0)
    limits = [f"{total - near} of {total} targets lie further above it"] if near < total else []
    if not total and not unknown:
        limits.append("the calibration leaves every layer dense at every target")
    if unknown:
        limits.append(f"the dense model cannot do the task ({', '.join(unknown)}): of no weight")
    return Verdict(
        f"The calibrated alpha and C lie on the Pareto front of the grid, or within {NEAR:.0%} of "
        f"the dense loss ({name}, loss against executed keys).",
        outcome,
        f"nats per token above the front at equal keys: {'; '.join(parts)}.",
        "" if outcome is Outcome.SUPPORTED else f"{_capital('; '.join(limits))}.",
    )


def against_presets(found: Sequence[Measured], seed: int) -> Verdict:
    """Over all tasks that count."""
    better = worse = total = outside = 0
    parts = []
    for measured in found:
        for losses in measured.losses:
            if not counts(losses):
                continue
            estimates = above_presets(measured, losses, seed)
            outside += estimates.count(None)
            known = [estimate for estimate in estimates if estimate is not None]
            total += len(known)
            better += sum(e.high < 0 for e in known)
            worse += sum(e.low > 0 for e in known)
            if known:
                means = [e.mean for e in known]
                parts.append(
                    f"{measured.name}, {losses.name} {min(means):+.3g} to {max(means):+.3g}"
                )
    outcome = Outcome.of(better == total and total > 0, better > worse)
    limit = f"worse beyond chance in {worse}, no difference in {total - better - worse}" + (
        f"; {outside} cost more or less than any preset" if outside else ""
    )
    return Verdict(
        "At equal executed keys the calibrated laws lose less than the presets, scaled to the "
        "context.",
        outcome,
        f"less loss beyond chance in {better} of {total} cases (task, target), nats per token "
        f"against the presets: {'; '.join(parts) or 'none compared'}.",
        "" if outcome is Outcome.SUPPORTED else f"{_capital(limit)}.",
    )


def _listed(measured: Measured, losses: Losses, estimates: Sequence[Estimate]) -> str:
    own = measured.of_kind("calibrated")
    return (
        ", ".join(
            f"{estimate} at {losses.keys[i]:.0f} keys"
            for i, estimate in zip(own, estimates, strict=True)
        )
        or "no sparse law"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
