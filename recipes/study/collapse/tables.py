"""The numbers of the study as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lit_sparse.recipes.study.collapse.induced import Scan, past_limits
from lit_sparse.recipes.study.collapse.measure import TASKS
from lit_sparse.recipes.study.collapse.training import ARMS, NONE, Plan, Result
from lit_sparse.recipes.study.collapse.verdicts import Arms
from lit_sparse.recipes.study.findings import Table

_SHARP = ("entropy_ratio", "gamma", "gamma_of_entropy", "saturated", "logit_max")


def induced(scans: Sequence[Scan]) -> Table:
    """The part without training."""
    names = list(scans[0].healthy.sharpness)
    rows = [
        [
            *(own.length, factor, own.loss),
            *(float(own.right[name].mean()) for name in TASKS),
            *own.sharpness.values(),
            ", ".join(sorted(past_limits(own))) or "-",
        ]
        for one in scans
        for factor, own in zip(one.factors, one.measured, strict=True)
    ]
    return Table(
        "induced",
        "Without training: logits times a factor; loss in nats a token, share of prompts "
        "answered right, means of the statistics of callbacks/README.md, and limits of "
        "CollapseMonitor that are passed",
        ["length", "factor", "loss", *TASKS, *names, "limits passed"],
        rows,
        shown=["length", "factor", "loss", *TASKS, *_SHARP, "limits passed"],
    )


def arms(results: Sequence[Result], plan: Plan) -> Table:
    """The fine-tunes, means of seeds."""
    at, twice = (Arms(results, length) for length in (plan.length, 2 * plan.length))
    loss = Arms(results, plan.length, by_loss=True)
    rows = []
    for start, mends in ARMS.items():
        for mend in mends:
            gains = [None if mend == NONE else str(own.gain(start, mend)) for own in (at, loss)]
            after = [result.after[plan.length].sharpness for result in at.of(start, mend)]
            rows.append(
                [
                    *(start, mend),
                    *(float(at.score(start, mend, before).mean()) for before in (True, False)),
                    *(gains[0], at.back(start, mend), float(twice.score(start, mend).mean())),
                    *(-float(loss.score(start, mend).mean()), gains[1], loss.back(start, mend)),
                    *(float(np.mean([sharp[name] for sharp in after])) for name in _SHARP),
                ]
            )
    return Table(
        "arms",
        f"Fine-tunes at {plan.length} tokens, means of seeds: share of prompts answered right "
        "before and after, loss in nats a token, of both the gain over no mend and the share of "
        "the cost of collapse that is back, and the statistics after",
        [
            *("start", "mend", "before", "after", "gain (95 %)", "back"),
            *(f"after, {2 * plan.length} tokens", "loss", "loss, gain (95 %)", "loss, back"),
            *_SHARP,
        ],
        rows,
    )


def runs(results: Sequence[Result]) -> Table:
    """Every run, before and after, at every length."""
    one = next(iter(results[0].after.values()))
    rows = [
        [
            *(result.run.start, result.run.mend, result.run.seed, length, when, own.loss),
            *(float(right.mean()) for right in own.right.values()),
            *own.sharpness.values(),
        ]
        for result in results
        for when, measured in (("before", result.before), ("after", result.after))
        for length, own in measured.items()
    ]
    columns = ["start", "mend", "seed", "length", "when", "loss", *one.right, *one.sharpness]
    return Table("runs", "Every run", columns, rows, in_report=False)
