"""Times and memory of work on one device, and the name of the device."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

LEAST_RUNS = 3
"""Timed runs of a part, however long they take."""

MOST_RUNS = 20
"""Timed runs of a part, however short they are."""

ALLOTMENT_MS = 300.0
"""Milliseconds of timed runs after which a part has been measured often enough."""

FLUSH_BYTES = 256 * 2**20
"""More than any level 2 cache: written before each run, so that no run finds its inputs there."""


def nothing() -> None:
    """Nothing to prepare."""


@dataclass(frozen=True)
class Part:
    """Work to time: `timed` gets what `prepare`, whose time does not count, returned."""

    timed: Callable[[Any], object]
    prepare: Callable[[], Any] = nothing


class Clock:
    """Times parts of work on one device: CUDA events, or the host's clock where that computes.

    Args:
        device: where the work runs.
        most: timed runs of a part; fewer where they take longer than `ALLOTMENT_MS` in all.
    """

    def __init__(self, device: torch.device, most: int = MOST_RUNS) -> None:
        self.device, self.most = device, most
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 0
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def runs_ms(self, part: Part, warm_up: bool = True, once: bool = False) -> list[float]:
        """Milliseconds of each run, in order.

        Args:
            warm_up: run once before, untimed: kernels compile and load at their first use.
            once: a single timed run.
        """
        if warm_up:
            self._run(part, 1)
        runs = self._run(part, 1)
        if not once:
            enough = int(ALLOTMENT_MS / max(runs[0], 1e-3))
            runs += self._run(part, min(max(enough, LEAST_RUNS), self.most) - 1)
        return runs

    def _run(self, part: Part, count: int) -> list[float]:
        if not self.cuda:
            return [self._host_run(part) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        # No synchronisation in between: while the device prepares and flushes, the host launches
        # ahead, as it does in training.
        for begin, end in events:
            state = part.prepare()
            self._flush.zero_()
            begin.record()
            part.timed(state)
            end.record()
            del state  # before the next one is made: at long lengths there is no room for two
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in events]

    def _host_run(self, part: Part) -> float:
        state = part.prepare()
        begin = time.perf_counter()
        part.timed(state)
        return (time.perf_counter() - begin) * 1e3

    def start_peak(self) -> None:
        """From here on `peak_mib` counts."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)

    def peak_mib(self) -> float | None:
        """Most MiB of tensors beyond those that stood at `start_peak`; None off CUDA."""
        if not self.cuda:
            return None
        return (torch.cuda.max_memory_allocated(self.device) - self._before) / 2**20

    def free(self) -> None:
        """Give the device back what nobody uses any more, after a failure above all."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def matmul_tflops(self, dtype: torch.dtype, size: int | None = None) -> float:
        """TFLOP/s of a big square matrix product: the ceiling that this device reaches here."""
        size = size or (8192 if self.cuda else 256)
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        runs = self.runs_ms(Part(lambda _: a @ b))
        return 2 * size**3 / (median(runs) * 1e-3) / 1e12


def cuda_environment(device: torch.device) -> dict[str, Any]:
    """The GPU and the libraries that compute on it."""
    properties = torch.cuda.get_device_properties(device)
    version = None
    with contextlib.suppress(ImportError):
        import triton

        version = triton.__version__
    return {
        "device": "cuda",
        "gpu": properties.name,
        "gpu_memory_mib": properties.total_memory // 2**20,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().split("\n")[0] or None
