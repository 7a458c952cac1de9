"""What the numbers say of the calibrated laws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lit_sparse.budget import PRESETS
from lit_sparse.recipes.study.alpha.measure import TEXT, Losses, Measured
from lit_sparse.recipes.study.alpha.pareto import distances
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.stats import Estimate, resampled_means

NEAR = 0.01
"""Share of the dense loss, or nats per token where that is more: as near as makes no difference."""

KNOWN = 0.5
"""Share of a task's prompts that a dense model must answer for its loss to say something."""


SAVING = 0.9
"""Share of the keys from which a law is as good as dense: that it loses nothing says nothing."""


def tolerance(losses: Losses) -> float:
    """What counts as near, nats per token."""
    return NEAR * max(losses.dense_loss, 1.0)


def counts(losses: Losses) -> bool:
    """Whether the dense model can do the task."""
    return losses.name == TEXT or losses.dense_right >= KNOWN


def saves(losses: Losses, laws: np.ndarray) -> np.ndarray:
    """Which laws leave out enough keys to be looked at."""
    return np.asarray(losses.keys[laws] <= SAVING * losses.dense_keys)


def above_front(measured: Measured, losses: Losses, seed: int) -> list[Estimate]:
    """How far each calibrated law lies above the front of the grid, nats per token."""
    return _above(measured, losses, measured.of_kind("grid"), seed)


def above_presets(
    measured: Measured, losses: Losses, seed: int
) -> dict[str, list[Estimate | None]]:
    """The same above each preset's multiples; None at costs that these do not reach."""
    found: dict[str, list[Estimate | None]] = {}
    own = losses.keys[measured.of_kind("calibrated")]
    for preset in PRESETS:
        laws = np.array([i for i, law in enumerate(measured.laws) if law.preset == preset])
        reach = losses.keys[laws].min(), losses.keys[laws].max()
        found[preset] = [
            estimate if reach[0] <= keys <= reach[1] else None
            for keys, estimate in zip(own, _above(measured, losses, laws, seed), strict=True)
        ]
    return found


def _above(measured: Measured, losses: Losses, others: np.ndarray, seed: int) -> list[Estimate]:
    own = measured.of_kind("calibrated")
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
    near = total = idle = 0
    parts, unknown = [], []
    for measured in found:
        losses = measured.losses[place]
        some = saves(losses, measured.of_kind("calibrated"))
        own = np.array(above_front(measured, losses, seed), dtype=object)[some].tolist()
        parts.append(f"{measured.name}: {_listed(measured, losses, own, some)}")
        if not counts(losses):
            unknown.append(measured.name)
            continue
        idle += int((~some).sum()) + len(measured.dense)
        total += len(own)
        near += sum(e.low <= 0 or e.mean <= tolerance(losses) for e in own)
    outcome = Outcome.of(near == total and total > 0 and not unknown and not idle, near > 0)
    limits = []
    if near < total:
        limits.append(f"{total - near} of {total} laws lie further above it")
    if idle:
        limits.append(f"targets left out, which need {SAVING:.0%} of the keys or more: {idle}")
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
    means: dict[str, list[float]] = {preset: [] for preset in PRESETS}
    better = worse = outside = 0
    for measured in found:
        for losses in filter(counts, measured.losses):
            some = saves(losses, measured.of_kind("calibrated")).tolist()
            for preset, estimates in above_presets(measured, losses, seed).items():
                for estimate, saving in zip(estimates, some, strict=True):
                    if estimate is None:
                        outside += saving
                    elif saving:
                        means[preset].append(estimate.mean)
                        better += estimate.high < 0
                        worse += estimate.low > 0
    total = sum(map(len, means.values()))
    outcome = Outcome.of(better == total and total > 0, better > worse)
    spans = [
        f"{preset} {np.mean(own):+.3g} ({min(own):+.3g} to {max(own):+.3g})"
        for preset, own in means.items()
        if own
    ]
    limit = f"worse beyond chance in {worse}, no difference in {total - better - worse}"
    if outside:
        limit += f"; {outside} cases cost more or less than was tried of the preset"
    return Verdict(
        "At equal executed keys the calibrated laws lose less than the presets' exponents do.",
        outcome,
        f"less loss beyond chance in {better} of {total} cases (task, target, preset); nats per "
        f"token above a preset, mean and range: {'; '.join(spans) or 'none compared'}.",
        "" if outcome is Outcome.SUPPORTED else f"{_capital(limit)}.",
    )


def _listed(
    measured: Measured, losses: Losses, estimates: Sequence[Estimate], some: np.ndarray
) -> str:
    keys = losses.keys[measured.of_kind("calibrated")][some]
    listed = [
        f"{estimate} at {own:.0f} keys" for estimate, own in zip(estimates, keys, strict=True)
    ]
    return ", ".join(listed) or "no law that leaves out keys"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
