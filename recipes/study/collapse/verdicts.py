"""The rules that make verdicts of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lit_sparse.recipes.study.collapse.induced import Scan, judge
from lit_sparse.recipes.study.collapse.measure import CHANCE
from lit_sparse.recipes.study.collapse.training import (
    ARMS,
    HEALTHY,
    LENGTH,
    NONE,
    Plan,
    Result,
)
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.stats import Estimate

BACK = 0.9
"""Share of the control's answers above chance with which a task is back."""

ABLE = 0.5
"""Least share of answer tokens that a model must get right for its loss of them to be seen."""

_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, quantile .975, of 1, 2, ... degrees of freedom."""

_UNABLE = f"the healthy control answers fewer than {ABLE:.0%} of the tokens"

_STARTS = {
    "concentrated": "a concentrated start",
    "high rate": "concentration by too large a learning rate of W_Q and W_K",
    "dispersed": "a dispersed start",
}


def paired(differences: ArrayLike) -> Estimate:
    """Mean over seeds and its 95 % interval, Student's t: a bootstrap of three values is too
    narrow."""
    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2:
        return Estimate(float(data.mean()), -math.inf, math.inf)
    freedom = min(len(data) - 1, len(_T975))
    half = _T975[freedom - 1] * data.std(ddof=1) / math.sqrt(len(data))
    return Estimate(float(data.mean()), float(data.mean() - half), float(data.mean() + half))


def of_scan(scan: Scan, seed: int) -> list[Verdict]:
    """Whether collapse shows in the task, where, and whether the monitor's limits come first."""
    found, sides = [], (scan.side(True), scan.side(False))
    healthy, able = scan.healthy, scan.healthy.accuracy >= ABLE
    unable = (
        f"the model answers only {healthy.accuracy:.0%} of the tokens, before any collapse: there "
        "is nothing to lose"
    )
    judged = [judge(side, seed) for side in sides]
    for name, side, own in zip(("Concentration", "Dispersion"), sides, judged, strict=True):
        shows = able and own.fall.low > 0
        whole = shows and own.threshold is not None
        half = "never half lost" if own.threshold is None else f"half lost at {own.threshold}"
        limit = "" if whole else "it costs answers, but not half of them"
        found.append(
            Verdict(
                f"{name} of all heads shows in a downstream task (retrieval)",
                Outcome.SUPPORTED if whole else Outcome.LIMITED if shows else Outcome.NOT_HERE,
                f"logits times {side.factors[-1]:g} cost {own.fall} of the answer tokens, of "
                f"{healthy.accuracy:.3f}; by gamma: {half}, rank correlation {own.rank}; loss of "
                f"text {healthy.loss:.3f} to {side.measured[-1].loss:.3f} nats",
                limit if able else unable,
            )
        )
    found.append(_at_one(judged[0].threshold, healthy.sharpness["gamma"], able, unable))
    return [*found, _limits_first(sides, able, unable)]


def _at_one(threshold: Estimate | None, healthy: float, able: bool, unable: str) -> Verdict:
    outcome, limit, numbers = Outcome.NOT_HERE, unable, "-"
    if able and threshold is None:
        limit = "no factor costs half of the answers"
    elif able and threshold is not None:
        numbers = (
            f"gamma by sigma, mean of heads: {threshold} where half is lost, {healthy:.3g} before"
        )
        limit = ""
        if threshold.low <= 1 <= threshold.high:
            outcome = Outcome.SUPPORTED
        elif 0.5 <= threshold.mean <= 2:
            outcome, limit = Outcome.LIMITED, "within a factor of 2 of it, not at it"
        else:
            limit = f"half is lost at {threshold.mean:.2g} times that"
    return Verdict("Concentration costs the task at gamma = 1", outcome, numbers, limit)


def _limits_first(sides: Sequence[Scan], able: bool, unable: str) -> Verdict:
    texts, first = [], []
    for name, side in zip(("concentration", "dispersion"), sides, strict=True):
        warned, lost = side.warned(), side.lost(0.5)
        texts.append(
            f"{name}: a limit passed from logits times {_factor(warned)}, half lost from "
            f"{_factor(lost)}"
        )
        if lost is not None:
            first.append(warned is not None and abs(math.log(warned)) <= abs(math.log(lost)))
    outcome = Outcome.NOT_HERE
    if able and first and any(first):
        outcome = Outcome.SUPPORTED if all(first) else Outcome.LIMITED
    limit = "" if outcome == Outcome.SUPPORTED else "not in both directions" if able else unable
    return Verdict(
        "The limits of `CollapseMonitor` are passed before half of the task is lost",
        outcome,
        "; ".join(texts),
        limit,
    )


def _factor(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


class Arms:
    """Outcomes by arm, paired by seed.

    Args:
        results: every arm of `ARMS` for every seed.
        length: at which.
    """

    def __init__(self, results: Sequence[Result], length: int) -> None:
        self._found = {(o.run.start, o.run.mend, o.run.seed): o for o in results}
        self.seeds = sorted({o.run.seed for o in results})
        self.length = length

    def accuracy(self, start: str, mend: str) -> np.ndarray:
        """Share of answer tokens after training: [seeds]."""
        return np.array([o.after[self.length].accuracy for o in self.of(start, mend)])

    @property
    def able(self) -> bool:
        """Whether the control answers enough for a loss of it to be seen."""
        return bool(self.accuracy(HEALTHY, NONE).mean() >= ABLE)

    def of(self, start: str, mend: str) -> list[Result]:
        """By seed."""
        return [self._found[start, mend, seed] for seed in self.seeds]

    def gain(self, start: str, mend: str) -> Estimate:
        """Of the mend over none."""
        return paired(self.accuracy(start, mend) - self.accuracy(start, NONE))

    def back(self, start: str, mend: str) -> float:
        """Answers above chance, over those of the control."""
        above = self.accuracy(start, mend).mean() - CHANCE
        return float(max(above, 0) / max(self.accuracy(HEALTHY, NONE).mean() - CHANCE, 1e-9))


def of_runs(results: Sequence[Result], plan: Plan) -> list[Verdict]:
    """Which mend brings the task back, from which start."""
    arms = Arms(results, plan.length)
    found = []
    for start, text in _STARTS.items():
        for mend in ARMS[start][1:]:
            found.append(_mends(arms, start, text, mend))
    return [*found, _longer(results, plan)]


def _mends(arms: Arms, start: str, text: str, mend: str) -> Verdict:
    gain, back, alone = arms.gain(start, mend), arms.back(start, mend), arms.back(start, NONE)
    if not arms.able:
        outcome, limit = Outcome.NOT_HERE, _UNABLE
    elif gain.low > 0 and back >= BACK:
        outcome, limit = Outcome.SUPPORTED, ""
    elif gain.low > 0:
        outcome, limit = (
            Outcome.LIMITED,
            f"{back:.0%} of the control's answers above chance are back",
        )
    elif alone >= BACK:
        outcome, limit = (
            Outcome.NOT_HERE,
            "the same training without a mend brings the task back too",
        )
    else:
        outcome, limit = Outcome.NOT_HERE, "no better than no mend, by the interval over seeds"
    losses = [
        np.mean([o.after[arms.length].loss for o in arms.of(start, own)]) for own in (mend, NONE)
    ]
    return Verdict(
        f"{_title(mend)} mends {text}",
        outcome,
        f"{gain} of the answer tokens over no mend; {back:.0%} of the control's above chance "
        f"({alone:.0%} without a mend); loss of text {losses[0]:.3f}, without {losses[1]:.3f} nats",
        limit,
    )


def _longer(results: Sequence[Result], plan: Plan) -> Verdict:
    arms = Arms(results, 2 * plan.length)
    gain, control = arms.gain(HEALTHY, LENGTH), arms.accuracy(HEALTHY, NONE).mean()
    losses = paired(
        [
            a.after[arms.length].loss - b.after[arms.length].loss
            for a, b in zip(arms.of(HEALTHY, LENGTH), arms.of(HEALTHY, NONE), strict=True)
        ]
    )
    able = Arms(results, plan.length).able
    better = able and gain.low > 0
    limit = "" if better else "answers at twice the length are no better, by the interval"
    limit = limit if able else _UNABLE
    return Verdict(
        "Length-scaled softmax helps a healthy model at twice the length that it is trained at",
        Outcome.SUPPORTED if better else Outcome.NOT_HERE,
        f"{gain} of the answer tokens over no mend, of {control:.3f}; loss of text {losses} nats",
        limit,
    )


def _title(mend: str) -> str:
    return "Length-scaled softmax" if mend == LENGTH else mend
