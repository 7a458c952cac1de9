"""A search among configurations of a kernel: time each, keep the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import TypeVar

from lit_sparse.recipes.benchmark.clock import Clock, Part
from lit_sparse.recipes.benchmark.peers import attempt

Config = TypeVar("Config")


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
