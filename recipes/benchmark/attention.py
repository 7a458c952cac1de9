"""Sparse attention, selection included, against dense attention: milliseconds, FLOPs, memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from lit_sparse.recipes.benchmark.load import NOTICEABLE, OtherLoad
from lit_sparse.recipes.benchmark.memory import peak_mib
from lit_sparse.recipes.benchmark.report import number, short
from lit_sparse.recipes.benchmark.steps import (
    Problem,
    Times,
    causal_pairs,
    dense_inputs,
    dense_step,
    executed_pairs,
    packed_inputs,
    sparse_step,
)

LONG = 32768
"""From this length on the dense side runs once, without a warm-up: it takes minutes."""

DENSE_MEMORY_UP_TO = 16384
"""Longest length, in tokens, at which the memory of the dense step is measured."""

GROUPS = (
    ("law", ("length", "k(n)", "density")),
    ("sparse, ms", ("select", "fwd", "bwd", "total")),
    ("dense, ms", ("runs", "fwd", "bwd", "total")),
    ("dense/sparse", ("time", "FLOPs")),
    ("sparse, MiB", ("peak", "per 1k")),
    ("dense, MiB", ("peak", "per 1k")),
)

NOTE = (
    "Medians of the runs; k(n) at the last token; density: kept causal pairs / causal pairs. "
    "time: median over pairs of a sparse and a dense run, one right after the other, selection "
    "included. FLOPs: what the executed pairs alone would allow (blocks whole, masked parts "
    "included, selection not counted). peak: memory of one step beyond q, k, v and the gradient "
    "of the output, in a process of its own; per 1k: for each 1024 tokens."
)


def measure(problem: Problem, repeats: int, threads: int, memory: bool = True) -> dict[str, Any]:
    """One length: all that the table shows, and the raw times in milliseconds.

    Sparse and dense runs take turns, so that slow changes of the machine hit both. Load of other
    processes does not hit both alike (see `load`), so it is measured too.
    """
    packed, dense = packed_inputs(problem), dense_inputs(problem)
    dense_repeats = repeats if problem.length < LONG else 1
    _, selection = sparse_step(problem, packed)
    if problem.length < LONG:
        dense_step(dense)
    load = OtherLoad()
    sparse_runs: list[Times] = []
    dense_runs: list[Times] = []
    for repeat in range(repeats):
        sparse_runs.append(_milliseconds(sparse_step(problem, packed)[0]))
        if repeat < dense_repeats:
            dense_runs.append(_milliseconds(dense_step(dense)))
    others = load.cores()
    del packed, dense

    pairs = zip(sparse_runs, dense_runs, strict=False)
    executed, causal = executed_pairs(selection), causal_pairs(selection)
    result: dict[str, Any] = {
        "length": problem.length,
        "keys": problem.budget(problem.length),
        "tile": selection.tile,
        "density": selection.density,
        "sparse_ms": _medians(sparse_runs),
        "dense_ms": _medians(dense_runs),
        "ratio": median(d["total"] / s["total"] for s, d in pairs),
        "executed_pairs": executed,
        "causal_pairs": causal,
        "flops_ratio": causal / executed,
        "other_cores": others,
        "sparse_runs_ms": sparse_runs,
        "dense_runs_ms": dense_runs,
    }
    if memory:
        result["sparse_peak_mib"] = peak_mib(problem, "sparse", threads)
        if problem.length <= DENSE_MEMORY_UP_TO:
            result["dense_peak_mib"] = peak_mib(problem, "dense", threads)
    return result


def cells(result: dict[str, Any]) -> list[str]:
    """The row of `GROUPS` for what `measure` returned."""
    sparse, dense, length = result["sparse_ms"], result["dense_ms"], result["length"]
    row = [str(length), str(result["keys"]), number(result["density"], 3)]
    row += [short(sparse[part]) for part in ("selection", "forward", "backward", "total")]
    row += [str(len(result["dense_runs_ms"]))]
    row += [short(dense[part]) for part in ("forward", "backward", "total")]
    row += [number(result["ratio"], 2), number(result["flops_ratio"], 2)]
    for side in ("sparse", "dense"):
        peak = result.get(f"{side}_peak_mib")
        row += [short(peak), short(None if peak is None else peak * 1024 / length)]
    return row


def warning(results: list[dict[str, Any]], threads: int) -> str | None:
    """A line for measurements that other processes disturbed, or None."""
    worst = max((result["other_cores"] or 0.0 for result in results), default=0.0)
    if worst < NOTICEABLE:
        return None
    line = f"DISTURBED: other processes kept up to {worst:.1f} cores busy during the timed runs."
    if threads > 1:
        line += (
            " With several threads the sparse side has been seen to lose far more by that than the "
            "dense one, so the ratios say little: repeat on a quiet machine, or with --threads 1."
        )
    return line


def run(
    problems: list[Problem],
    repeats: int,
    threads: int,
    memory: bool,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    results = []
    for problem in problems:
        progress(f"{problem.length} tokens ...")
        results.append(measure(problem, repeats, threads, memory))
    return results


def _medians(runs: list[Times]) -> Times:
    return {part: median(run[part] for run in runs) for part in runs[0]}


def _milliseconds(times: Times) -> Times:
    return {part: seconds * 1e3 for part, seconds in times.items()}
