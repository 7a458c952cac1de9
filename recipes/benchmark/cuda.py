"""The benchmark on a GPU: sparse attention and its peers, from 4k to 1M tokens, in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from lit_sparse.attention import select
from lit_sparse.attention.select import default_tile
from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark import cost
from lit_sparse.recipes.benchmark.clock import Clock
from lit_sparse.recipes.benchmark.cost import BACKWARD, FORWARD, Point, Schedule
from lit_sparse.recipes.benchmark.peers import PEERS, Inputs, Parts, Peer, attempt, sparse_parts
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.benchmark.steps import (
    Problem,
    causal_pairs,
    executed_pairs,
    packed_inputs,
)
from lit_sparse.recipes.benchmark.verify import verify

LENGTHS = tuple(4096 * 2**i for i in range(9))
"""4k to 1M tokens."""

DENSE_LIMIT = (8192, 16384)
"""Lengths at which the kernels that keep everything are held against SDPA flash."""

Save = Callable[[dict[str, Any]], None]
Progress = Callable[[str], None]


class Benchmark:
    """One run over all lengths; `report` grows as it goes, and is saved after each length.

    Args:
        problems: one a length, otherwise alike.
        clock: the device, as a timer.
        gpu: its name; decides at which rate the floor is.
        seconds: what all may take, or None; dense peers give way to the operator, others to both.
        save: called with the report after each length, so that a crash keeps what was measured.
        progress: called with lines for the impatient.
        peers: who else runs.
        limits: lengths at which the dense limit is measured, where they are asked for.
    """

    def __init__(
        self,
        problems: Iterable[Problem],
        clock: Clock,
        gpu: str | None,
        seconds: float | None,
        save: Save,
        progress: Progress,
        peers: dict[str, Peer] | None = None,
        limits: Iterable[int] = DENSE_LIMIT,
    ) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.length)
        self.clock, self.gpu, self.seconds = clock, gpu, seconds
        self.save, self.progress = save, progress
        self.peers = PEERS if peers is None else peers
        self.limits = frozenset(limits)
        missing = {name: peer.missing() for name, peer in self.peers.items()}
        self.stopped = {name: reason for name, reason in missing.items() if reason is not None}
        self.report: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Measure everything there is time for.

        Raises:
            WrongResult: the operator computes something else; nothing is timed then.
            BadArgument: it does not take these shapes or this dtype.
        """
        begin = time.monotonic()
        first = self.problems[0]
        shape = {key: value for key, value in first.to_dict().items() if key != "length"}
        tile = first.tile or default_tile(first.heads // first.kv_heads)
        rate = self.clock.matmul_tflops(getattr(torch, first.dtype))
        self.report = {
            "problem": {**shape, "tile": tile},
            "matmul_tflops": rate,
            "floor_tflops": cost.floor_rate(self.gpu, rate),
            "verification": self._verify(),
            "dense_limit": [],
            "results": [],
        }
        self.schedule = Schedule(self._points(), rate, self.seconds, begin=begin)
        self._announce()
        for length in sorted({problem.length for problem in self.problems} & self.limits):
            self.report["dense_limit"].append(self._dense_limit(replace(first, length=length)))
        for problem in self.problems:
            self.progress(f"{problem.length} tokens, {self.schedule.elapsed():.0f} s so far ...")
            self.report["results"].append(self._length(problem))
            self.report["seconds"] = self.schedule.elapsed()
            self.save(self.report)
            self.clock.free()
        return self.report

    # -- before the lengths --

    @property
    def _backend(self) -> str:
        """By name: without one a selection that keeps everything runs PyTorch's dense kernel."""
        return "triton" if self.clock.cuda else "cpu"

    def _verify(self) -> dict[str, Any]:
        self.progress("verifying ...")
        law, device = self.problems[-1], self.clock.device
        everything = replace(law, budget=Budget.dense())
        try:
            return {
                "law": verify(law, device),
                "everything kept": verify(everything, device, self._backend),
            }
        except (ValueError, NotImplementedError) as error:
            raise BadArgument(f"sparse attention refuses these shapes: {error}") from error

    def _points(self) -> Iterable[Point]:
        for problem in self.problems:
            sparse, length = cost.planned_pairs(problem), problem.length
            yield Point("sparse", "sparse", length, cost.flops(problem, sparse))
            for name, peer in self.peers.items():
                if name in self.stopped:
                    continue
                pairs = cost.dense_pairs(problem) if peer.kind == "dense" else sparse
                yield Point(name, peer.kind, length, cost.flops(problem, pairs))

    def _announce(self) -> None:
        parts = self.schedule.estimate()
        limit = "no limit" if self.seconds is None else f"limit {self.seconds:.0f} s"
        shares = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in parts.items())
        self.progress(
            f"a big matrix product reaches {self.report['matmul_tflops']:.3g} TFLOP/s; all will "
            f"take about {sum(parts.values()):.0f} s ({shares}; guessed from FLOPs, {limit})"
        )

    def _dense_limit(self, problem: Problem) -> dict[str, Any]:
        """The operator's kernels with everything kept, and SDPA flash."""
        problem = replace(problem, budget=Budget.dense())
        entry: dict[str, Any] = {"length": problem.length}

        def measure() -> None:
            inputs = self._inputs(problem)
            q, k, *_ = inputs
            selection = select(q, k, problem.budget, block=problem.block, tile=problem.tile)
            parts = sparse_parts(problem, inputs, selection, self._backend)
            parts["total"] = parts.pop("kernels")  # there is nothing to select
            del parts["selection"]
            entry["sparse"] = self._time(parts)
            if "flash" in self.peers:
                made, _ = self.peers["flash"].make(problem, inputs, selection)
                entry["flash"] = self._time(made)

        _, reason = attempt(measure, self.clock)
        if reason is not None:
            entry["skipped"] = reason
        return entry

    # -- one length --

    def _length(self, problem: Problem) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "length": problem.length,
            "keys": problem.budget(problem.length),
            "peers": {},
            "skipped": {},
        }
        begin = time.monotonic()
        point = self._point("sparse", problem)
        made, reason = attempt(lambda: self._sparse(problem, entry), self.clock, only_memory=True)
        if made is None:
            entry["skipped"]["sparse"] = reason
            self.schedule.drop("sparse", problem.length)
            for name in self.peers:
                entry["skipped"][name] = f"without the operator ({reason})"
                self.schedule.drop(name, problem.length)
            return entry
        step = entry["sparse"]["ms"]["total"] * 1e-3
        self.schedule.done(point, step, time.monotonic() - begin)
        dense = [name for name, peer in self.peers.items() if peer.kind == "dense"]
        others = [name for name in self.peers if name not in dense]
        dense.sort(key=lambda name: self.schedule.speed(name), reverse=True)
        for name in dense + others:
            self._peer(name, problem, made, entry)
        _conclude(entry)
        return entry

    def _sparse(self, problem: Problem, entry: dict[str, Any]) -> tuple[Inputs, Any]:
        """Times the operator; returns what the peers need."""
        inputs = self._inputs(problem)
        q, k, *_ = inputs
        selection = select(q, k, problem.budget, block=problem.block, tile=problem.tile)
        executed = executed_pairs(selection)
        entry |= {
            "density": selection.density,
            "executed_pairs": executed,
            "causal_pairs": causal_pairs(selection),
            "floor_ms": cost.floor_ms(problem, executed, self.report["floor_tflops"]),
        }
        entry["sparse"] = self._time(sparse_parts(problem, inputs, selection))
        ms = entry["sparse"]["ms"]
        entry["tflops"] = {
            "forward": cost.tflops(problem, executed, FORWARD, ms["forward"]),
            "backward": cost.tflops(problem, executed, BACKWARD, ms["backward"]),
            "kernels": cost.tflops(problem, executed, FORWARD + BACKWARD, ms["kernels"]),
        }
        return inputs, selection

    def _peer(self, name: str, problem: Problem, made: tuple[Inputs, Any], entry: Any) -> None:
        """Times one peer, or notes why not."""
        peer = self.peers[name]
        result, reason = None, self.stopped.get(name) or self._needless(name, problem, entry)
        if reason is None:
            point = self._point(name, problem)
            self.progress(f"{problem.length} tokens: {peer.label} ...")
            begin, once = time.monotonic(), self.schedule.once(point)

            def measure() -> dict[str, Any]:
                work, remark = peer.make(problem, *made)
                return {**self._time(work, once), "remark": remark}

            result, reason = attempt(measure, self.clock)
            if result is None:
                # What does not fit or run here will not do so at a longer length.
                self.stopped[name] = reason or ""
            else:
                whole = result["ms"][peer.parts[0]] * 1e-3
                self.schedule.done(point, whole, time.monotonic() - begin)
                entry["peers"][name] = result
        if result is None:
            entry["skipped"][name] = reason
            self.schedule.drop(name, problem.length)

    def _needless(self, name: str, problem: Problem, entry: Any) -> str | None:
        """Why a peer that could run does not."""
        point = self._point(name, problem)
        faster = [other for other in entry["peers"] if self.peers[other].kind == "dense"]
        if self.schedule.only_faster(point) and faster:
            return f"{self.peers[faster[0]].label} is the faster one"
        return self.schedule.refusal(point)

    def _time(self, parts: Parts, once: bool = False) -> dict[str, Any]:
        """Raw times, medians, and the peak memory of the first part, which is all of the step.

        once: only that, and a single run without a warm-up.
        """
        runs: dict[str, list[float]] = {}
        peak = None
        for part, work in list(parts.items())[: 1 if once else None]:
            if not runs:
                if not once:
                    self.clock.runs_ms(work, warm_up=False, once=True)
                self.clock.start_peak()
            runs[part] = self.clock.runs_ms(work, warm_up=bool(runs), once=once)
            peak = self.clock.peak_mib() if peak is None else peak
        return {"ms": {part: median(ms) for part, ms in runs.items()}, "runs_ms": runs} | {
            "peak_mib": peak
        }

    def _inputs(self, problem: Problem) -> Inputs:
        q, k, v, grad = packed_inputs(problem, self.clock.device)
        self.clock.free()  # float32 drafts
        return q, k, v, grad

    def _point(self, name: str, problem: Problem) -> Point:
        return self.schedule.pending[name, problem.length]


def _conclude(entry: dict[str, Any]) -> None:
    """What follows from the times of one length."""
    sparse = entry["sparse"]["ms"]
    entry["selection_share"] = sparse["selection"] / sparse["total"]
    entry["times_floor"] = sparse["total"] / entry["floor_ms"]
    entry["flops_ratio"] = entry["causal_pairs"] / entry["executed_pairs"]
    for result in entry["peers"].values():
        same = [part for part in ("kernels", "total") if part in result["ms"]]
        result["ratio"] = {part: result["ms"][part] / sparse[part] for part in same}
    dense = {name: entry["peers"][name] for name in ("flash", "cudnn") if name in entry["peers"]}
    faster = min(dense, key=lambda name: dense[name]["ms"]["total"], default=None)
    entry["faster_dense"] = faster
    entry["ratio"] = None if faster is None else dense[faster]["ratio"]["total"]
