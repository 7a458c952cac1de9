"""The rules that make verdicts of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from lit_sparse.recipes.study.collapse.induced import Fall, Scan, fall
from lit_sparse.recipes.study.collapse.training import ARMS, HEALTHY, LENGTH, NONE, Plan, Result
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.stats import Estimate, mean_of

BACK = 0.9
"""Share of what collapse cost that is back where a mend mends."""

ABLE = 0.5
"""Least share of a task's prompts that a model must answer for a loss of it to be seen."""

_SIDES = ("concentration", "dispersion")

_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, quantile .975, of 1, 2, ... degrees of freedom."""

_STARTS = (
    ("concentrated", "a concentrated start", 1),
    ("high rate", "training of W_Q and W_K at too large a rate", 1),
    ("dispersed", "a dispersed start, at the length of training", 1),
    ("dispersed", "a dispersed start, at twice the length of training", 2),
)
"""Start, what it is called, and the length that it is judged at, in lengths of training."""


def able(scan: Scan) -> list[str]:
    """The tasks that the model as it is can do."""
    return [name for name, right in scan.healthy.right.items() if right.mean() >= ABLE]


def of_scan(scan: Scan, seed: int) -> list[Verdict]:
    """Whether collapse shows downstream, where, and whether the monitor's limits come first."""
    tasks = able(scan)
    sides = {name: scan.side(name == _SIDES[0]) for name in _SIDES}
    falls = {name: {t: fall(side, t, seed) for t in tasks} for name, side in sides.items()}
    return [
        *(_shows(name, side, falls[name], seed) for name, side in sides.items()),
        _at_one(sides[_SIDES[0]], falls[_SIDES[0]]),
        _limits_first({name: side.only(tasks) for name, side in sides.items() if tasks}),
    ]


def _shows(name: str, side: Scan, falls: dict[str, Fall], seed: int) -> Verdict:
    first, last = side.measured[0], side.measured[-1]
    loss = mean_of(last.losses - first.losses, seed)
    half = [task for task, own in falls.items() if own.threshold is not None]
    some = [task for task, own in falls.items() if own.cost.low > 0]
    if falls and len(half) == len(falls):
        outcome, limit = Outcome.SUPPORTED, ""
    elif some or loss.low > 0:
        outcome = Outcome.LIMITED
        keeps = ", ".join(task for task in falls if task not in half)
        limit = f"not half of the answers of {keeps} is lost" if keeps else "in the loss alone"
    else:
        outcome, limit = Outcome.NOT_HERE, "neither answers nor loss change for certain"
    if not falls:
        limit = f"in the loss alone: {_UNABLE}"
    answers = [
        f"{task}: {own.cost} of {first.right[task].mean():.3g}, "
        + ("never half lost" if own.threshold is None else f"half lost at gamma {own.threshold}")
        + ("" if math.isnan(own.rank.mean) else f", rank correlation with gamma {own.rank}")
        for task, own in falls.items()
    ]
    return Verdict(
        f"{name.capitalize()} of all heads shows downstream, in answers and loss",
        outcome,
        f"logits times {side.factors[-1]:g} cost, of the prompts, "
        + "; ".join([*answers, f"and {loss} nats a token of text, on {first.loss:.3g}"]),
        limit,
    )


def _at_one(side: Scan, falls: dict[str, Fall]) -> Verdict:
    gammas = [m.sharpness["gamma"] for m in (side.measured[0], side.measured[-1])]
    found = {task: own.threshold for task, own in falls.items() if own.threshold is not None}
    numbers = f"gamma by sigma, mean of heads, is {gammas[0]:.3g} as the model is; " + (
        "; ".join(f"half of {task} is lost at {own}" for task, own in found.items())
        or f"up to {gammas[1]:.4g} no task is half lost"
    )
    outcome, limit = Outcome.NOT_HERE, "the task is not lost there"
    if not falls:
        limit = _UNABLE
    elif found and all(own.low <= 1 <= own.high for own in found.values()):
        outcome, limit = Outcome.SUPPORTED, ""
    elif found and all(0.5 <= own.mean <= 2 for own in found.values()):
        outcome, limit = Outcome.LIMITED, "within a factor of 2 of it"
    return Verdict("Concentration costs a task at gamma = 1", outcome, numbers, limit)


def _limits_first(sides: dict[str, Scan]) -> Verdict:
    texts, first = [], {}
    for name, side in sides.items():
        warned, lost = side.warned(), side.lost(0.5)
        texts.append(
            f"{name}: a limit passed from logits times {_factor(warned)}, half of the answers lost "
            f"from {_factor(lost)}"
        )
        if lost is not None:
            first[name] = warned is not None and abs(math.log(warned)) <= abs(math.log(lost))
    late = ", ".join(name for name, before in first.items() if not before)
    outcome = Outcome.NOT_HERE
    if any(first.values()):
        outcome = Outcome.LIMITED if late else Outcome.SUPPORTED
    limit = f"too late for {late}" if late else "" if first else "no half is ever lost"
    return Verdict(
        "The limits of `CollapseMonitor` are passed before half of the answers is lost",
        outcome,
        "; ".join(texts) or "-",
        limit if sides else _UNABLE,
    )


def _factor(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def paired(differences: ArrayLike) -> Estimate:
    """Mean over seeds and its 95 % interval, Student's t: a bootstrap of three values is too
    narrow."""
    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2:
        return Estimate(float(data.mean()), -math.inf, math.inf)
    freedom = min(len(data) - 1, len(_T975))
    half = float(_T975[freedom - 1] * data.std(ddof=1) / math.sqrt(len(data)))
    return Estimate(float(data.mean()), float(data.mean() - half), float(data.mean() + half))


class Arms:
    """Results by arm, paired by seed.

    Args:
        results: every arm of `ARMS` for every seed.
        length: at which.
        by_loss: whether the score of a model is minus its loss of text, instead of the share of
            prompts that it answers.
    """

    def __init__(self, results: Sequence[Result], length: int, by_loss: bool = False) -> None:
        self._found = {(r.run.start, r.run.mend, r.run.seed): r for r in results}
        self.seeds = sorted({r.run.seed for r in results})
        self.length, self.by_loss = length, by_loss

    def of(self, start: str, mend: str) -> list[Result]:
        """By seed."""
        return [self._found[start, mend, seed] for seed in self.seeds]

    def score(self, start: str, mend: str, before: bool = False) -> np.ndarray:
        """After training, or before it: [seeds]."""
        models = [(r.before if before else r.after)[self.length] for r in self.of(start, mend)]
        return np.array([-m.loss if self.by_loss else m.accuracy for m in models])

    def gain(self, start: str, mend: str) -> Estimate:
        """Of the mend over none."""
        return paired(self.score(start, mend) - self.score(start, NONE))

    def cost(self, start: str) -> Estimate:
        """What collapse costs at its worst: the control, less what the start without a mend is
        before training or after it."""
        worst = min((self.score(start, NONE, before) for before in (True, False)), key=np.mean)
        return paired(self.score(HEALTHY, NONE) - worst)

    def back(self, start: str, mend: str) -> float:
        """Share of that cost that the arm does not have; NaN where there is none."""
        left = self.score(HEALTHY, NONE).mean() - self.score(start, mend).mean()
        cost = self.cost(start).mean
        return float(1 - left / cost) if cost > 0 else math.nan


def of_runs(results: Sequence[Result], plan: Plan) -> list[Verdict]:
    """Which mend brings back what collapse cost, from which start."""
    able = bool(Arms(results, plan.length).score(HEALTHY, NONE).mean() >= ABLE)
    found = []
    for start, text, times in _STARTS:
        answers, loss = (Arms(results, times * plan.length, own) for own in (False, True))
        # Answers where at least half of them is lost, else the loss.
        lost = answers.cost(start).mean > answers.score(HEALTHY, NONE).mean() / 2
        for mend in ARMS[start][1:]:
            found.append(_mends(answers, answers if lost else loss, start, text, mend))
    found.append(_longer(Arms(results, 2 * plan.length)))
    return found if able else [_undecided(verdict) for verdict in found]


def _undecided(verdict: Verdict) -> Verdict:
    return replace(verdict, outcome=Outcome.NOT_HERE, limit=_UNABLE)


def _mends(answers: Arms, arms: Arms, start: str, text: str, mend: str) -> Verdict:
    """By the scores of `arms`."""
    gain, back, alone = arms.gain(start, mend), arms.back(start, mend), arms.back(start, NONE)
    cost = arms.cost(start)
    if cost.low <= 0:
        outcome, limit = Outcome.NOT_HERE, "the start costs nothing for certain, over seeds"
    elif gain.low > 0 and back >= BACK:
        outcome, limit = Outcome.SUPPORTED, ""
    elif gain.low > 0:
        outcome, limit = Outcome.LIMITED, f"{back:.0%} of what collapse cost is back"
    elif alone >= BACK:
        outcome, limit = Outcome.NOT_HERE, "the same training without a mend brings it back, too"
    else:
        outcome, limit = Outcome.NOT_HERE, "no better than no mend, by the interval over seeds"
    what = "nats a token of text" if arms.by_loss else "of the prompts"
    right = [answers.score(start, own).mean() for own in (NONE, mend)]
    return Verdict(
        f"{_title(mend)} mends {text}",
        outcome,
        f"collapse costs {cost} {what}; {back:.0%} of it is back, {alone:.0%} "
        f"without a mend; gain over no mend {gain}; answers {right[0]:.3g} without, {right[1]:.3g} "
        "with it",
        limit,
    )


def _longer(arms: Arms) -> Verdict:
    gain, control = arms.gain(HEALTHY, LENGTH), arms.score(HEALTHY, NONE).mean()
    better = gain.low > 0
    return Verdict(
        "Length-scaled softmax helps a healthy model at twice the length that it is trained at",
        Outcome.SUPPORTED if better else Outcome.NOT_HERE,
        f"{gain} of the prompts over no mend, of {control:.3g}",
        "" if better else "no better, by the interval over seeds",
    )


def _title(mend: str) -> str:
    return "Length-scaled softmax" if mend == LENGTH else mend


_UNABLE = f"the model as it is answers fewer than {ABLE:.0%} of the prompts"
