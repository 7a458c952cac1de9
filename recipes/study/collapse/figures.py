"""What the study shows: answers against gamma, and what each mend comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_sparse.recipes.study.collapse.induced import Scan
from lit_sparse.recipes.study.collapse.training import ARMS, HEALTHY, NONE, Plan, Result
from lit_sparse.recipes.study.collapse.verdicts import Arms
from lit_sparse.recipes.study.report import COLOURS

_MARKS = "osD^v"

_SHARP = {
    "entropy_ratio": "entropy / ln n",
    "max_weight": "heaviest key",
    "saturated": "saturated rows",
    "jacobian_trace": "1 - sum p^2",
}


def induced(scans: Sequence[Scan], figure: Any) -> None:
    """Answers by task and loss by length, against gamma; how sharp attention is, by factor."""
    answers, losses, sharp = figure.subplots(1, 3)
    longest = scans[-1]
    styles = [
        {"color": colour, "marker": mark, "markersize": 4}
        for colour, mark in zip(COLOURS, _MARKS, strict=False)
    ]

    def against_gamma(axes: Any, scan: Scan, values: list[float], label: str, style: Any) -> None:
        gamma = [m.sharpness["gamma"] for m in scan.measured]
        axes.plot(gamma, values, label=label, **style)
        own = list(scan.factors).index(1.0)
        axes.plot(gamma[own], values[own], "o", ms=10, mfc="none", mec=style["color"])

    for task, style in zip(longest.healthy.right, styles, strict=False):
        values = [float(m.right[task].mean()) for m in longest.measured]
        against_gamma(answers, longest, values, task, style)
    for scan, style in zip(scans, styles, strict=False):
        label = f"{scan.healthy.length} tokens"
        against_gamma(losses, scan, [m.loss for m in scan.measured], label, style)
    for axes in (answers, losses):
        axes.set(xscale="log", xlabel="gamma by sigma, mean of heads (dashed: 1)")
        axes.axvline(1, color="grey", linestyle="--", linewidth=1)
        axes.legend(fontsize=8)
    length = longest.healthy.length
    answers.set(title=f"prompts answered right, {length} tokens", ylim=(-0.03, 1.05))
    losses.set(title="loss of text, nats a token")
    for (name, label), style in zip(_SHARP.items(), styles, strict=False):
        sharp.plot(
            longest.factors, [m.sharpness[name] for m in longest.measured], label=label, **style
        )
    sharp.set_xscale("log", base=2)
    sharp.set(
        xlabel="factor on the logits", title=f"attention, {length} tokens", ylim=(-0.03, 1.05)
    )
    sharp.legend(fontsize=8)


def mends(results: Sequence[Result], plan: Plan, figure: Any) -> None:
    """Answers before and after each arm, at the trained and at twice the length, and the loss."""
    names = [(start, mend) for start, own in ARMS.items() for mend in own]
    panels = (
        (Arms(results, plan.length), f"prompts answered right, {plan.length} tokens"),
        (Arms(results, 2 * plan.length), f"prompts answered right, {2 * plan.length} tokens"),
        (Arms(results, plan.length, True), f"loss over the control's, nats, {plan.length} tokens"),
    )
    for axes, (arms, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        control = arms.score(HEALTHY, NONE)
        for place, (start, mend) in enumerate(names):
            after, before = (arms.score(start, mend, early) for early in (False, True))
            if arms.by_loss:  # seeds have other texts: by seed against the control
                after, before = control - after, control - before
            colour = COLOURS[6] if mend == NONE else COLOURS[0]
            axes.barh(place, after.mean(), color=colour, alpha=0.6, height=0.65)
            axes.plot(after, np.full(len(after), place), ".", color=COLOURS[1], markersize=6)
            axes.plot(before.mean(), place, "|", color=COLOURS[5], ms=15, markeredgewidth=2.5)
        level = 0 if arms.by_loss else control.mean()
        axes.axvline(level, color="grey", linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(names)), [f"{start}: {mend}" for start, mend in names])
        if not arms.by_loss:
            axes.set_xlim(-0.03, 1.05)
    axes.invert_yaxis()
