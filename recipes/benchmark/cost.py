"""What attention costs in floating-point operations, and how long measuring it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import default_tile
from lit_sparse.recipes.benchmark.clock import ALLOTMENT_MS, LEAST_RUNS, MOST_RUNS
from lit_sparse.recipes.benchmark.steps import Problem

FORWARD, BACKWARD = 4, 10
"""FLOPs of a (query, key) pair of one query head, in head dimensions. Forward: two matrix products
of 2 each. Backward: five, the dense flash convention (FlashAttention-2, arXiv 2307.08691)."""

GOAL_TFLOPS = 800.0
"""The floor's rate on a Hopper GPU; elsewhere it is that of the big matrix product."""

SLOW_SECONDS = 2.0
"""A dense step that takes longer runs once, without a warm-up and without its parts."""

ONLY_FASTER_FROM = 2**19
"""From this length on, in tokens, only the faster dense peer runs."""

ASSUMED_SHARE = {"sparse": 0.5, "dense": 0.6, "blocks": 0.1}
"""Shares of the matrix product's rate that the first estimate assumes, for want of a measurement;
measured lengths replace them."""

TELLING_SECONDS = 0.01
"""A shorter step does not fill the device: longer ones will not be as slow for each FLOP."""

ASSUMED_SETUP = {"sparse": 1.0, "dense": 1.0, "blocks": 20.0}
"""Seconds of compilation and input building that it assumes, likewise (the operator itself was
compiled when it was verified)."""

PARTS_WORK = {"sparse": 3.5, "dense": 2.3, "blocks": 3.5}
"""Steps' worth of work in one run of every part: a backward alone needs its forward first."""


def flops(problem: Problem, pairs: int, parts: int = FORWARD + BACKWARD) -> float:
    """FLOPs of `pairs` (query, key) pairs of each query head; `parts`: FORWARD, BACKWARD or both.

    Those of the selection are not counted: they are overhead.
    """
    return float(parts) * problem.head_dim * problem.heads * pairs


def tflops(problem: Problem, pairs: int, parts: int, milliseconds: float) -> float:
    return flops(problem, pairs, parts) / (milliseconds * 1e-3) / 1e12


def floor_ms(problem: Problem, pairs: int, rate_tflops: float) -> float:
    """Milliseconds of forward and backward of those pairs at that rate."""
    return flops(problem, pairs) / (rate_tflops * 1e12) * 1e3


def floor_rate(gpu: str | None, measured_tflops: float) -> float:
    """TFLOP/s of the floor: the goals' on the GPUs they were set for, else what was measured."""
    hopper = gpu is not None and any(name in gpu for name in ("H100", "H200", "GH200"))
    return GOAL_TFLOPS if hopper else measured_tflops


def planned_pairs(problem: Problem) -> int:
    """`executed_pairs` of a sparse step, from the lengths alone."""
    tile = problem.tile or default_tile(problem.heads // problem.kv_heads)
    bounds = (0, problem.length)
    plan = make_plan(bounds, bounds, problem.budget, problem.block, tile)
    if plan.keeps_everything:
        return dense_pairs(problem)
    return int(plan.offsets[-1]) * problem.block * tile


def dense_pairs(problem: Problem) -> int:
    return problem.length * (problem.length + 1) // 2


def measuring_seconds(step: float, kind: str, once: bool = False) -> float:
    """Seconds to measure a step of `step` seconds with its parts, or that alone `once`."""
    if once:
        return step
    enough = ALLOTMENT_MS * 1e-3 / step
    return PARTS_WORK[kind] * (1 + min(max(enough, LEAST_RUNS), MOST_RUNS)) * step


MARGIN = 1.1
"""What matters more keeps this many times the seconds predicted for it."""


@dataclass(frozen=True)
class Point:
    """One contestant at one length.

    Args:
        kind: "sparse", "dense", or "blocks" for peers on the selection's blocks; in this order
            they give way when time runs short, the last first.
        flops: of one forward and backward.
    """

    name: str
    kind: str
    length: int
    flops: float


class Schedule:
    """What is left to measure, and whether there is time for it.

    Args:
        points: all of them.
        rate_tflops: of the big matrix product.
        seconds: what the whole benchmark may take; None: as long as it takes.
        now: the clock, in seconds.
        begin: its reading when the benchmark began; None: now.
    """

    _RANK = ("sparse", "dense", "blocks")

    def __init__(
        self,
        points: Iterable[Point],
        rate_tflops: float,
        seconds: float | None,
        now: Callable[[], float] = time.monotonic,
        begin: float | None = None,
    ) -> None:
        self.pending = {(point.name, point.length): point for point in points}
        self.seconds, self._now = seconds, now
        self._begin = now() if begin is None else begin
        self._ceiling = rate_tflops * 1e12
        self._last: dict[str, tuple[float, float]] = {}
        """Seconds of the last measured step, and its FLOP/s."""
        self._setup: dict[str, float] = {}

    def elapsed(self) -> float:
        return self._now() - self._begin

    def step_seconds(self, point: Point) -> float:
        """One forward and backward: at the rate of the last length, or at an assumed one."""
        assumed = ASSUMED_SHARE[point.kind] * self._ceiling
        step, rate = self._last.get(point.name, (0.0, 0.0))
        return point.flops / (rate if step >= TELLING_SECONDS else max(rate, assumed))

    def once(self, point: Point) -> bool:
        """Whether it is a slow dense step, of which the whole alone is timed, once."""
        slow = point.kind == "dense" and self.step_seconds(point) > SLOW_SECONDS
        return slow or self.only_faster(point)

    @staticmethod
    def only_faster(point: Point) -> bool:
        return point.kind == "dense" and point.length >= ONLY_FASTER_FROM

    def predict(self, point: Point) -> float:
        """Seconds that measuring it takes."""
        setup = self._setup.get(point.name, ASSUMED_SETUP[point.kind])
        return setup + measuring_seconds(self.step_seconds(point), point.kind, self.once(point))

    def estimate(self) -> dict[str, float]:
        """Seconds left to measure, by kind."""
        return {kind: self._left((kind,)) for kind in self._RANK}

    def refusal(self, point: Point) -> str | None:
        """Why there is no time for it, or None. What matters more keeps its share of the time."""
        if self.seconds is None:
            return None
        reserved = self._left(self._RANK[: self._RANK.index(point.kind)])
        needed = self.predict(point)
        left = self.seconds - self.elapsed() - MARGIN * reserved
        return None if needed <= left else f"no time for it within --seconds {self.seconds:.0f}"

    def done(self, point: Point, step: float, wall: float) -> None:
        """It was measured. step: seconds of one forward and backward; wall: of everything."""
        measuring = measuring_seconds(step, point.kind, self.once(point))
        self._setup[point.name] = max(wall - measuring, 0.0)
        self._last[point.name] = step, point.flops / step
        self.drop(point.name, point.length)

    def drop(self, name: str, length: int) -> None:
        """It needs no more time."""
        self.pending.pop((name, length), None)

    def speed(self, name: str) -> float:
        """FLOP/s at the last length; infinite where it did not run yet."""
        return self._last[name][1] if name in self._last else float("inf")

    def _left(self, kinds: tuple[str, ...]) -> float:
        chosen = [point for point in self.pending.values() if point.kind in kinds]
        total = sum(self.predict(point) for point in chosen if not self.only_faster(point))
        faster: dict[int, float] = {}
        for point in filter(self.only_faster, chosen):
            one = self.predict(point)
            faster[point.length] = min(one, faster.get(point.length, one))
        return total + sum(faster.values())
