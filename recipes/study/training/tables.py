"""The tables: a line a rule, a line a run, losses by position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lit_sparse.recipes.study.findings import Table
from lit_sparse.recipes.study.training.measure import Result, by_arm


def all_of(results: list[Result]) -> list[Table]:
    return [_summary(results), _answers(results), _positions(results), _runs(results)]


def _summary(results: list[Result]) -> Table:
    lengths = sorted(results[0].losses)
    columns = [
        "rule",
        "executed / dense pairs",
        *(f"loss at {length}, nats" for length in lengths),
        "std over seeds",
        "last quarter, nats",
        "above itself run densely",
        "captured mass",
        "tokens/s",
        "minutes a run",
    ]
    rows = []
    for runs in by_arm(results).values():
        longest = [run.loss(lengths[-1]) for run in runs]
        captured = [run.captured for run in runs if run.captured is not None]
        rows.append(
            [
                runs[0].arm.title,
                runs[0].arm.executed,
                *(_mean(run.loss(length) for run in runs) for length in lengths),
                float(np.std(longest, ddof=1)) if len(longest) > 1 else None,
                _mean(run.losses[lengths[-1]].late.mean() for run in runs),
                _mean(run.gap(lengths[-1]) for run in runs),
                _mean(captured) if captured else None,
                _mean(run.tokens_per_second for run in runs),
                _mean(run.seconds / 60 for run in runs),
            ]
        )
    return Table("summary", "Means over the seeds", columns, rows)


def _answers(results: list[Result]) -> Table:
    columns = ["rule", "task", "tokens", "prompts right", "answer tokens right", "nats a token"]
    rows = []
    for runs in by_arm(results).values():
        for task, at in runs[0].answers.items():
            for length in at:
                found = [run.answers[task][length] for run in runs]
                means = (
                    _mean(own.accuracy.mean for own in found),
                    _mean(own.token_accuracy for own in found),
                    _mean(own.loss for own in found),
                )
                rows.append([runs[0].arm.title, task, length, *means])
    return Table("answers", "Tasks, means over the seeds", columns, rows)


def _positions(results: list[Result]) -> Table:
    """At the longest length."""
    longest = results[0].longest
    parts = results[0].losses[longest].parts
    rows = [
        [
            runs[0].arm.title,
            *(_mean(run.losses[longest].of_texts(*part).mean() for run in runs) for part in parts),
        ]
        for runs in by_arm(results).values()
    ]
    columns = ["rule", *(f"{start} to {end - 1}" for start, end in parts)]
    title = f"Nats per token by position in texts of {longest} tokens, means over the seeds"
    return Table("positions", title, columns, rows)


def _runs(results: list[Result]) -> Table:
    lengths = sorted(results[0].losses)
    columns = ["rule", "seed", *(f"loss at {n}, nats" for n in lengths), "minutes"]
    rows = [
        [run.arm.title, run.seed, *(run.loss(length) for length in lengths), run.seconds / 60]
        for run in results
    ]
    return Table("runs", "Every run", columns, rows, in_report=False)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
