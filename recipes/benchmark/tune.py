"""lit-sparse benchmark --tune: the kernels' launch table against alternatives, on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.recipes.benchmark.clock import Clock, Part
from lit_sparse.recipes.benchmark.peers import attempt
from lit_sparse.recipes.benchmark.report import number, render_table
from lit_sparse.recipes.benchmark.steps import Problem, packed_inputs

if TYPE_CHECKING:
    from lit_sparse.attention.triton.config import Launch

Config = TypeVar("Config")

GROUPS = (
    ("kernel", ("name", "what is timed")),
    ("launch", ("rows", "step", "warps", "stages", "tma")),
    ("time", ("ms", "to the table's")),
)

TIMED = {"masses": "selection", "forward": "forward", "dq": "backward", "dkdv": "backward"}
"""Kernel -> the part of a step that contains it."""


def tune(problem: Problem, clock: Clock, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time each kernel's alternatives, the others at their rows of the table, which stays as it is.

    Returns, for each kernel, its launches with median milliseconds of the part that holds it,
    fastest first, or the reason why one cannot run; and which of them is the table's.
    """
    from lit_sparse.attention.triton.config import launch, replaced

    inputs = packed_inputs(problem, clock.device)
    results: dict[str, Any] = {}
    for kernel, part in TIMED.items():
        progress(f"{kernel} ...")
        standing = launch(kernel, clock.device, problem.head_dim)

        def work(row: Launch, kernel: str = kernel, part: str = part) -> Callable[[], object]:
            def step() -> object:
                with replaced(kernel, clock.device, problem.head_dim, row):
                    return run()

            run = _parts(problem, inputs)[part]
            return step

        found = search(alternatives(standing), work, clock)
        results[kernel] = [
            {**asdict(row), "ms": ms, "failed": why, "standing": row == standing}
            for row, ms, why in found
        ]
    return {"problem": problem.to_dict(), "kernels": results}


def alternatives(standing: Launch) -> list[Launch]:
    """The row itself and its neighbours: half and twice the rows and steps, warps, stages."""
    rows = [standing]
    for count in (standing.rows // 2, standing.rows * 2):
        if 16 <= count <= 256:
            # 64 rows under 8 warps would be computed twice.
            rows += [replace(standing, rows=count, warps=4 if count <= 64 else 8)]
    for step in (standing.step // 2, standing.step * 2):
        if 16 <= step <= 128:
            rows += [replace(standing, step=step)]
    rows += [replace(standing, warps=12 - standing.warps)] if standing.warps in (4, 8) else []
    rows += [replace(standing, stages=stages) for stages in (2, 4, 5)]
    if standing.tma:
        rows += [replace(standing, tma=False)]
    return rows


def lines(result: dict[str, Any]) -> list[str]:
    """A table of all launches that ran, and below it why others did not."""
    rows, failures = [], []
    for kernel, launches in result["kernels"].items():
        standing = next((row["ms"] for row in launches if row["standing"]), None)
        for row in launches:
            shape = [str(row[name]) for name in ("rows", "step", "warps", "stages")]
            shape += ["yes" if row["tma"] else "no"]
            if row["ms"] is None:
                failures.append(f"{kernel} {' '.join(shape)}: {row['failed']}")
                continue
            ratio = None if standing is None else row["ms"] / standing
            mark = " (table)" if row["standing"] else ""
            rows.append([kernel, TIMED[kernel], *shape, number(row["ms"], 3),
                         number(ratio, 3) + mark])  # fmt: skip
    return [*render_table(GROUPS, rows), *failures]


def search(
    candidates: Iterable[Config], work: Callable[[Config], Callable[[], object]], clock: Clock
) -> list[tuple[Config, float | None, str | None]]:
    """(candidate, median milliseconds, None), fastest first, then (candidate, None, why it failed).

    Args:
        candidates: configurations, such as tile sizes, warps and stages.
        work: what to time under a candidate; called once for each.
    """

    def measure(candidate: Config) -> float:
        step = work(candidate)
        return median(clock.runs_ms(Part(lambda _: step())))

    timed = [(candidate, *attempt(partial(measure, candidate), clock)) for candidate in candidates]
    return sorted(timed, key=lambda entry: float("inf") if entry[1] is None else entry[1])


def _parts(problem: Problem, inputs: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], object]]:
    """The three parts of a step, each by itself."""
    from lit_sparse.attention.op import get_backend
    from lit_sparse.attention.options import Options

    q, k, v, grad = (x.detach() for x in inputs)
    backend, options = get_backend("triton"), Options(problem.head_dim**-0.5)

    def choose() -> Any:
        return select(q, k, problem.budget, block=problem.block, tile=problem.tile)

    selection = choose()
    out, lse = sparse_attention(q, k, v, selection, backend="triton")
    return {
        "selection": choose,
        "forward": lambda: sparse_attention(q, k, v, selection, backend="triton"),
        "backward": lambda: backend.backward(grad, q, k, v, None, out, lse, selection, options),
    }
