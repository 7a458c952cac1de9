"""The tables of the study of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_sparse.recipes.study.findings import Table
from lit_sparse.recipes.study.windows import persistence, synthetic, trained
from lit_sparse.recipes.study.windows.compare import READINGS, compare
from lit_sparse.recipes.study.windows.cost import ADAPTIVE, RULES
from lit_sparse.recipes.study.windows.persistence import Growth
from lit_sparse.recipes.study.windows.synthetic import REGIMES, Errors
from lit_sparse.recipes.study.windows.trained import Trained

_NAMES = tuple(rule.name for rule in RULES)
_ADAPTIVE = RULES.index(ADAPTIVE)
_ERRORS = ("keys", "lengths", *_NAMES, f"constant less {ADAPTIVE.name}", "low", "high")


def synthetic_tables(found: Errors, seed: int) -> list[Table]:
    rows: list[list[Any]] = []
    best: list[list[Any]] = []
    by_length: list[list[Any]] = []
    for norm in synthetic.NORMS:
        for i, regime in enumerate(REGIMES):
            values, case = found.of(norm, i), [norm, regime.name]
            rows += [[*case, *line] for line in _compared(values, found.costs, seed)]
            by_length += [[*case, *line] for line in _by_length(values, found.costs)]
            errors = values.mean(-1)
            winners = [
                ", ".join(_NAMES[j] for j in reduce(errors, 2).argmin(1))
                for reduce in READINGS.values()
            ]
            best.append([*case, regime.exponent, *winners])
    shown = ", ".join(f"{cost:.0f}" for cost in found.costs)
    case_names = ("norm", "logits", "C of the need")
    return [
        Table(
            "synthetic_best",
            f"Synthetic rows: the window with the least error at {shown} mean keys per query",
            (*case_names, "best in the mean of lengths", "best for the worst length"),
            best,
        ),
        Table(
            "synthetic",
            "Synthetic rows: errors at equal mean keys per query, 95 % intervals",
            ("norm", "logits", *_ERRORS),
            rows,
            in_report=False,
        ),
        Table(
            "synthetic_lengths",
            "Synthetic rows: errors by document length",
            ("norm", "logits", "keys", "window", *map(str, found.lengths)),
            by_length,
            in_report=False,
        ),
    ]


def trained_tables(found: Sequence[Trained], seed: int) -> list[Table]:
    rows: list[list[Any]] = []
    by_length: list[list[Any]] = []
    executed: list[list[Any]] = []
    for model in found:
        for norm in trained.NORMS:
            values, case = model.of(norm), [model.name, norm]
            rows += [[*case, *line] for line in _compared(values, model.costs, seed)]
            by_length += [
                [*case, *line[:2], int(length), error]
                for line in _by_length(values, model.costs)
                for length, error in zip(model.lengths, line[2:], strict=True)
            ]
        executed += [[model.name, *line] for line in model.executed.tolist()]
    return [
        Table(
            "trained",
            "Trained: errors at equal executed keys per query, 95 % intervals; the loss difference "
            "in nats per token",
            ("model", "norm", *_ERRORS),
            rows,
        ),
        Table(
            "trained_executed",
            "Trained: keys that a query read, mean over queries, layers and heads",
            ("model", *_NAMES),
            executed,
        ),
        Table(
            "trained_lengths",
            "Trained: errors by document length",
            ("model", "norm", "keys", "window", "length", "error"),
            by_length,
            in_report=False,
        ),
    ]


def growth_table(found: Growth) -> Table:
    rows: list[list[Any]] = []
    for i, name in enumerate(persistence.WINDOWS):
        for place, n in enumerate(found.contexts):
            all_rows = n in found.all_contexts
            largest = float(found.largest[i, :, place].mean()) if all_rows else None
            keys = persistence.keys_of(name, n)
            rows.append([name, n, keys, float(found.one[i, :, place].mean()), largest])
    return Table(
        "slow_windows",
        "Output error ||o - o_S|| / rms ||v|| as the context grows",
        ("window", "n", "keys", "one row", "largest of n rows"),
        rows,
        in_report=False,
    )


def _compared(values: np.ndarray, costs: Sequence[float], seed: int) -> list[list[Any]]:
    """Lines of `_ERRORS`."""
    lines: list[list[Any]] = []
    for reading in READINGS:
        found = compare(values, reading, seed)
        for i, cost in enumerate(costs):
            gain = [float(x[i, _ADAPTIVE]) for x in (found.gain, found.low, found.high)]
            lines.append([round(cost, 1), reading, *found.errors[i].tolist(), *gain])
    return lines


def _by_length(values: np.ndarray, costs: Sequence[float]) -> list[list[Any]]:
    """Lines of keys, window, and the error of each length."""
    means = values.mean(-1)
    return [
        [round(cost, 1), name, *means[i, j].tolist()]
        for i, cost in enumerate(costs)
        for j, name in enumerate(_NAMES)
    ]
