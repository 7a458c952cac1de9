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
            *map(own.of_task, TASKS),
            *own.sharpness.values(),
            ", ".join(sorted(past_limits(own))) or "-",
        ]
        for one in scans
        for factor, own in zip(one.factors, one.measured, strict=True)
    ]
    return Table(
        "induced",
        "Without training: logits times a factor; loss in nats a token, share of answer tokens "
        "right, means of the statistics of callbacks/README.md, limits of CollapseMonitor passed",
        ["length", "factor", "loss", *TASKS, *names, "limits passed"],
        rows,
        shown=["length", "factor", "loss", *TASKS, *_SHARP, "limits passed"],
    )


def arms(results: Sequence[Result], plan: Plan) -> Table:
    """The fine-tunes, means of seeds."""
    at, twice = (Arms(results, length) for length in (plan.length, 2 * plan.length))
    rows = []
    for start, mends in ARMS.items():
        for mend in mends:
            own = [result.after[plan.length] for result in at.of(start, mend)]
            before = [result.before[plan.length].accuracy for result in at.of(start, mend)]
            rows.append(
                [
                    *(start, mend, float(np.mean(before))),
                    float(at.accuracy(start, mend).mean()),
                    None if mend == NONE else str(at.gain(start, mend)),
                    at.back(start, mend),
                    float(twice.accuracy(start, mend).mean()),
                    float(np.mean([m.loss for m in own])),
                    *(float(np.mean([m.sharpness[name] for m in own])) for name in _SHARP),
                ]
            )
    return Table(
        "arms",
        f"Fine-tunes at {plan.length} tokens, means of seeds: share of answer tokens right before "
        "and after, gain over no mend, answers above chance over the control's, loss in nats a "
        "token, statistics after",
        [
            *("start", "mend", "before", "after", "gain (95 %)", "of control"),
            *(f"after, {2 * plan.length} tokens", "loss", *_SHARP),
        ],
        rows,
    )


def runs(results: Sequence[Result]) -> Table:
    """Every run, before and after, at every length."""
    names = list(next(iter(results[0].after.values())).sharpness)
    rows = [
        [
            *(result.run.start, result.run.mend, result.run.seed, length, when, own.loss),
            *map(own.of_task, TASKS),
            *own.sharpness.values(),
        ]
        for result in results
        for when, measured in (("before", result.before), ("after", result.after))
        for length, own in measured.items()
    ]
    columns = ["start", "mend", "seed", "length", "when", "loss", *TASKS, *names]
    return Table("runs", "Every run", columns, rows, in_report=False)
