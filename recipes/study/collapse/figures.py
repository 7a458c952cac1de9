"""What the study shows: answers against gamma, and what each mend comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_sparse.recipes.study.collapse.induced import Scan
from lit_sparse.recipes.study.collapse.training import ARMS, NONE, Plan, Result
from lit_sparse.recipes.study.collapse.verdicts import Arms, paired
from lit_sparse.recipes.study.report import COLOURS

_MARKS = "osD^v"


def induced(scans: Sequence[Scan], figure: Any) -> None:
    """Answers and loss against gamma; entropy and the heaviest key against the factor."""
    answers, losses, sharp = figure.subplots(1, 3)
    for colour, mark, scan in zip(COLOURS, _MARKS, scans, strict=False):
        length = f"{scan.healthy.length} tokens"
        gamma = [m.sharpness["gamma"] for m in scan.measured]
        style = {"color": colour, "marker": mark, "markersize": 4}
        answers.plot(gamma, [m.accuracy for m in scan.measured], label=length, **style)
        losses.plot(gamma, [m.loss for m in scan.measured], label=length, **style)
        for axes, value in ((answers, scan.healthy.accuracy), (losses, scan.healthy.loss)):
            axes.plot(scan.healthy.sharpness["gamma"], value, "o", ms=10, mfc="none", mec=colour)
    for axes, title in ((answers, "answer tokens right"), (losses, "loss of text, nats a token")):
        axes.set(xscale="log", xlabel="gamma by sigma (mean of heads)", title=title)
        axes.axvline(1, color="grey", linestyle="--", linewidth=1)
        axes.annotate(
            "gamma = 1", (1, 0.99), xycoords=("data", "axes fraction"), rotation=90, va="top",
            ha="right", fontsize=8, color="grey",
        )  # fmt: skip
    answers.set_ylim(0, 1.03)
    answers.legend(fontsize=8)
    scan = scans[-1]
    for (name, label), colour, mark in zip(
        (
            ("entropy_ratio", "entropy / ln n"),
            ("max_weight", "heaviest key"),
            ("saturated", "saturated rows"),
            ("jacobian_trace", "1 - sum p^2"),
        ),
        COLOURS,
        _MARKS,
        strict=False,
    ):
        values = [m.sharpness[name] for m in scan.measured]
        sharp.plot(scan.factors, values, color=colour, marker=mark, ms=4, label=label)
    sharp.set_xscale("log", base=2)
    sharp.set(
        xlabel="factor on the logits",
        title=f"how sharp, at {scan.healthy.length} tokens",
        ylim=(0, 1.03),
    )
    sharp.legend(fontsize=8)


def mends(results: Sequence[Result], plan: Plan, figure: Any) -> None:
    """Answers before and after each arm, at the trained and at twice the length."""
    names = [(start, mend) for start, own in ARMS.items() for mend in own]
    places = np.arange(len(names))
    for axes, length in zip(
        figure.subplots(1, 2, sharey=True), (plan.length, 2 * plan.length), strict=True
    ):
        arms = Arms(results, length)
        for place, (start, mend) in zip(places, names, strict=True):
            after = paired(arms.accuracy(start, mend))
            before = np.mean([o.before[length].accuracy for o in arms.of(start, mend)])
            colour = COLOURS[6] if mend == NONE else COLOURS[0]
            axes.barh(place, after.mean, color=colour, alpha=0.75, height=0.65)
            values = arms.accuracy(start, mend)
            axes.plot(values, np.full(len(values), place), ".", color=COLOURS[1], markersize=6)
            axes.plot(before, place, "|", color=COLOURS[5], markersize=16, markeredgewidth=2.5)
        control = arms.accuracy(*names[0]).mean()
        axes.axvline(control, color="grey", linestyle="--", linewidth=1)
        axes.set(xlim=(0, 1.03), xlabel="answer tokens right", title=f"{length} tokens")
        axes.set_yticks(places, [f"{start}: {mend}" for start, mend in names])
    axes.invert_yaxis()
    figure.supxlabel(
        "bars: after training, mean of seeds (dots); red: before; dashed: the healthy control",
        fontsize=9,
    )
