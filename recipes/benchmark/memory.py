"""Peak memory of one attention step beyond its inputs, measured in a process of its own.

A process that has run other steps holds memory that a new step takes without asking the system for
more, so each measurement starts a fresh one. There a short step loads what is loaded once (thread
pools, kernels), the allocator gives back what it holds, the kernel's high-water mark is reset, and
the step runs. What the mark then stands above the memory in use before is the peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lit_sparse.recipes.benchmark.steps import (
    Problem,
    dense_inputs,
    dense_step,
    packed_inputs,
    sparse_step,
)

_WARM_UP = 2048
_MODULE = "lit_sparse.recipes.benchmark.memory"


def peak_mib(problem: Problem, side: Literal["sparse", "dense"], threads: int) -> float | None:
    """MiB that one step needs beyond q, k, v and the gradient of the output.

    None where it cannot be measured: a system without `/proc/self/clear_refs` and `getrusage`, or a
    process that the system ended, as it does when memory runs out.
    """
    task = {"problem": problem.to_dict(), "side": side, "threads": threads}
    return in_own_process(_MODULE, task)


def in_own_process(module: str, task: dict[str, Any]) -> Any:
    """What a module prints as JSON when it is run with a task, JSON too, as its argument.

    None where the system ended it.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, json.dumps(task)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode < 0:
        return None
    if child.returncode:
        raise RuntimeError(f"the memory measurement failed:\n{child.stderr}")
    return json.loads(child.stdout)


def _measure(task: dict[str, Any]) -> float | None:
    import torch

    torch.set_num_threads(task["threads"])
    problem = Problem.from_dict(task["problem"])
    short = replace(problem, length=min(problem.length, _WARM_UP))
    _step(short, task["side"])()
    step = _step(problem, task["side"])
    give_back()
    used = reset_mark()
    if used is None:
        return None
    step()
    mark = high_water_mark()
    return None if mark is None else max(mark - used, 0) / 2**20


def _step(problem: Problem, side: str) -> Callable[[], object]:
    """The step of one side with its inputs made."""
    if side == "sparse":
        packed = packed_inputs(problem)
        return lambda: sparse_step(problem, packed)
    dense = dense_inputs(problem)
    return lambda: dense_step(dense)


def give_back() -> None:
    """Have the C allocator return free pages, so that the step has to ask for its own."""
    # Where the allocator is not glibc's, what it holds goes uncounted.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_mark() -> int | None:
    """Bytes in use, with the high-water mark set back to them where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return high_water_mark()  # the mark itself: a peak before the step hides part of the step
    return _status("VmRSS")


def high_water_mark() -> int | None:
    """Bytes that were in use at most since `reset_mark`."""
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
