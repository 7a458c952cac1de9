"""The benchmark of a training step: sparse attention against dense, length by length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import default_tile
from lit_sparse.recipes.benchmark.clock import Clock
from lit_sparse.recipes.benchmark.cost import SLOW_SECONDS
from lit_sparse.recipes.benchmark.load import OtherLoad
from lit_sparse.recipes.benchmark.peers import attempt
from lit_sparse.recipes.benchmark.training import (
    SPARSE,
    WARM_UP,
    Side,
    Task,
    Training,
    dense_sides,
    peak_mib,
)
from lit_sparse.recipes.estimate.compute import Work, work
from lit_sparse.recipes.estimate.gpus import Gpu
from lit_sparse.recipes.estimate.kinds import Keeps
from lit_sparse.recipes.estimate.model import read_model
from lit_sparse.recipes.estimate.step import Recipe

Report = dict[str, Any]
Result = TypeVar("Result")

TRIAL = {"cpu": 4096, "cuda": 32_768}
"""Tokens at which dense sides are tried, at most."""


class StepBenchmark:
    """One run over all lengths; `report` grows as it goes, and is saved after each length.

    Args:
        task: what trains.
        lengths: tokens of a row, which is one document.
        device: where.
        repeats: timed steps of each side.
        gpu: its data sheet, for the share of its peak; None: there is none.
        seconds: what all may take, or None; repeats give way, then dense attention.
        memory: measure peaks on a CPU too, where that takes processes of their own.
        save: called with the report after each length.
        progress: called with lines for the impatient.
    """

    def __init__(
        self,
        task: Task,
        lengths: Iterable[int],
        device: torch.device,
        repeats: int,
        gpu: Gpu | None,
        seconds: float | None,
        memory: bool,
        save: Callable[[Report], None],
        progress: Callable[[str], None],
    ) -> None:
        self.task, self.lengths, self.device = task, sorted(lengths), device
        self.repeats, self.gpu, self.seconds, self.memory = repeats, gpu, seconds, memory
        self.save, self.progress = save, progress
        self.clock = Clock(device)
        self._begin = time.monotonic()
        self._rates: dict[str, float] = {}
        """FLOP/s of a side's last step, by its label."""
        self._stopped: dict[str, str] = {}
        """Why a side runs no more."""

    def run(self) -> Report:
        """Measure everything there is time for.

        Raises:
            ValueError, NotImplementedError: SparseLM or the operator refuses the task.
        """
        self.training = Training(self.task, self.device, self.lengths[-1])
        self.model = read_model(None, self.task.architecture(self.lengths[-1]))
        results: list[Report] = []
        report = {
            "problem": self.task.to_dict(),
            "parameters": self.model.parameters,
            "peak_tflops": None if self.gpu is None else self.gpu.tflops,
            "repeats": self.repeats,
            "results": results,
        }
        for length in self.lengths:
            self.progress(f"{length} tokens, {self._elapsed():.0f} s so far ...")
            results.append(self._length(length))
            report["seconds"] = self._elapsed()
            self.save(report)
            self.clock.free()
        return report

    # -- one length --

    def _length(self, length: int) -> Report:
        if self.task.compile:
            torch.compiler.reset()  # else the second length gets graphs of any length
        cost = self.work(length)
        entry: Report = {
            "length": length,
            "keys": self.task.budget(length),
            "executed_share": cost.executed,
            "skipped": {},
        }
        flops = {"sparse": cost.total, "dense": cost.dense}
        sides = {"sparse": SPARSE} if self._ready(SPARSE, length, cost.total, entry) else {}
        dense = self._faster_dense(length, cost.dense, entry)
        sides |= {} if dense is None else {"dense": dense}
        load = OtherLoad()
        measured = self._take_turns(sides, length, flops, entry)
        entry["other_cores"] = load.cores() if self.device.type == "cpu" else None
        for kind, result in measured.items():
            side = sides[kind]
            if self.memory and self.device.type == "cpu":
                self.progress(f"{length} tokens: memory of {side.label} ...")
                threads = torch.get_num_threads()
                result["peak_mib"] = peak_mib(self.task, length, side, threads)
            entry[kind] = self._conclude(result, side, length, flops[kind], cost.dense)
        if len(measured) == 2:
            entry["ratio"] = _ratios(entry["sparse"], entry["dense"])
        return entry

    def work(self, length: int) -> Work:
        """FLOPs of a step, with sparse attention and with dense."""
        task = self.task
        tile = task.tile or default_tile(self.model.groups)
        recipe = Recipe(
            dtype=getattr(torch, task.dtype),
            recompute=task.activations != "keep",
            loss=task.loss,
        )
        bounds = (0, length)
        return work(
            self.model,
            recipe,
            {Keeps(task.budget): task.layers},
            lambda keeps: make_plan(bounds, bounds, keeps.budget, task.block, tile),
            rows=1,
        )

    def _faster_dense(self, length: int, flops: float, entry: Report) -> Side | None:
        """The dense side that runs: the fastest, or where one step takes long, that of the length
        before. None: none can.
        """
        found = [s for s in dense_sides(self.device, self.task.compile) if self._runs(s, entry)]
        known = [side for side in found if side.label in self._rates]
        best = max(known, key=lambda side: self._rates[side.label], default=None)
        if best is None or flops / self._rates[best.label] < SLOW_SECONDS:
            # Compiled layers would be compiled again for another length.
            trial = length if self.task.compile else min(length, TRIAL[self.device.type])
            tried = [side for side in found if self._try(side, trial, entry)]
            best = max(tried, key=lambda side: self._rates[side.label], default=None)
        return best if best and self._ready(best, length, flops, entry) else None

    def _try(self, side: Side, length: int, entry: Report) -> bool:
        """Learns how fast a dense side is."""
        row = self.training.row(length)

        def second() -> float:
            self._timed(side, row)
            return self._timed(side, row)[0]

        seconds = self._attempt(second, side, entry)
        if seconds is not None:
            self._rates[side.label] = self.work(length).dense / seconds
        return seconds is not None

    def _ready(self, side: Side, length: int, flops: float, entry: Report) -> bool:
        """Runs a side once, untimed, where it can and there is time."""
        if not self._runs(side, entry):
            return False
        if side.label in self._rates and self.seconds is not None:
            # The step that warms up and one that counts.
            needed = 2 * flops / self._rates[side.label]
            if needed > self.seconds - self._elapsed():
                reason = f"no time for it within --seconds {self.seconds:.0f}"
                entry["skipped"][side.label] = reason
                return False
        # On a CPU nothing compiles or tunes itself for a length, and long steps take minutes.
        whole = self.device.type == "cuda" or self.task.compile
        row = self.training.row(length if whole else min(length, WARM_UP))
        made = self._attempt(partial(self._timed, side, row), side, entry)
        if made is not None and whole:
            self._rates.setdefault(side.label, flops / made[0])
        return made is not None

    def _runs(self, side: Side, entry: Report) -> bool:
        """Whether nothing stopped it at a shorter length."""
        if side.label in self._stopped:
            entry["skipped"][side.label] = self._stopped[side.label]
        return side.label not in self._stopped

    def _attempt(self, action: Callable[[], Result], side: Side, entry: Report) -> Result | None:
        """What an action of a side returns, or None where it fails; that is noted."""
        # Of sparse attention want of memory alone may pass.
        made, reason = attempt(action, self.clock, only_memory=side is SPARSE)
        if reason is not None:
            entry["skipped"][side.label] = reason
            # What does not fit or run here will not do so at a longer length.
            self._stopped[side.label] = reason
            self.training.optimizer.zero_grad()
            self.clock.free()
        return made

    def _take_turns(
        self, sides: dict[str, Side], length: int, flops: dict[str, float], entry: Report
    ) -> dict[str, Report]:
        """Timed steps, the sides by turns: slow changes of the machine hit both alike."""
        row = self.training.row(length)
        found: dict[str, Report] = {
            kind: {"runs_s": [], "peak_mib": None, "loss": None} for kind in sides
        }
        for _ in range(self._affordable(sides, flops)):
            for kind, side in sides.items():
                if kind not in found:
                    continue
                made = self._attempt(partial(self._timed, side, row), side, entry)
                if made is None:
                    del found[kind]
                    continue
                found[kind]["runs_s"].append(made[0])
                found[kind]["loss"] = made[1]
                found[kind]["peak_mib"] = self._peak_mib()
        for kind in found:
            self._rates[sides[kind].label] = flops[kind] / median(found[kind]["runs_s"])
        return found

    def _affordable(self, sides: dict[str, Side], flops: dict[str, float]) -> int:
        """Turns that there is time for."""
        rates = {kind: self._rates.get(side.label) for kind, side in sides.items()}
        turn = sum(flops[kind] / rate for kind, rate in rates.items() if rate)
        if self.seconds is None or not turn:
            return self.repeats
        return max(1, min(self.repeats, int((self.seconds - self._elapsed()) / turn)))

    def _timed(self, side: Side, row: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Seconds of one step, and its loss."""
        self.training.use(side)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        loss = self.training.step(side, row)
        if cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin, float(loss)

    def _peak_mib(self) -> float | None:
        """Of the last step, weights and optimizer states included."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) / 2**20

    def _conclude(
        self, result: Report, side: Side, length: int, flops: float, dense_flops: float
    ) -> Report:
        """What follows from the times of one side."""
        seconds = median(result["runs_s"])
        counts = {"executed": flops, "dense_equivalent": dense_flops}
        rates = {name: count / seconds / 1e12 for name, count in counts.items()}
        shares = None
        if self.gpu is not None:
            shares = {name: rate / self.gpu.tflops for name, rate in rates.items()}
        return {
            "attention": side.label,
            "seconds": seconds,
            "quartiles_s": _quartiles(result["runs_s"]),
            "tokens_per_second": length / seconds,
            "tflops": rates,
            "mfu": shares,
            **result,
        }

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin


def _quartiles(runs: list[float]) -> tuple[float, float] | None:
    """The first and the third, of three runs or more."""
    if len(runs) < 3:
        return None
    first, _, third = quantiles(runs, n=4, method="inclusive")
    return first, third


def _ratios(sparse: Report, dense: Report) -> dict[str, float | None]:
    """Sparse / dense, of what the table shows. Times: median over turns, one right after the
    other.
    """
    turns = zip(sparse["runs_s"], dense["runs_s"], strict=True)
    peaks = sparse["peak_mib"], dense["peak_mib"]
    return {
        "tokens_per_second": median(d / s for s, d in turns),
        "peak": None if None in peaks else peaks[0] / peaks[1],
    }
