"""`lit-sparse fit` in processes of their own: runs that are made once and found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_sparse.files import write_whole
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.shipped_configs import shipped_configs


@dataclass(frozen=True)
class Fit:
    """A run.

    Args:
        name: of its directory.
        config: a shipped config, or a file.
        keys: changes to it, dotted name -> value as on the command line.
    """

    name: str
    config: str
    keys: Mapping[str, str]

    def arguments(self) -> list[str]:
        changes = [part for key, value in self.keys.items() for part in (f"--{key}", value)]
        return ["--config", self.config, "--run.name", self.name, *changes]


def run_fits(
    fits: Sequence[Fit], root: Path, threads: int, progress: Callable[[str], None]
) -> list[Path]:
    """Run those that have not been run, as many at a time as there are cores for.

    A run that was stopped goes on from its newest checkpoint, and one that is finished and had the
    same arguments is left as it is. Output goes to ROOT/NAME.log.

    Args:
        root: parent of the runs' directories.
        threads: of each process.

    Returns:
        the runs' directories, which hold `huggingface/`, in order.

    Raises:
        BadArgument: a run failed; the message has its last line.
    """
    root.mkdir(parents=True, exist_ok=True)
    waiting = [fit for fit in fits if not _finished(fit, root / fit.name)]
    if done := len(fits) - len(waiting):
        progress(f"{done} of {len(fits)} runs are there already")
    room = max(len(os.sched_getaffinity(0)) // threads, 1)
    running: list[tuple[Fit, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            while waiting and len(running) < room:
                fit = waiting.pop(0)
                progress(f"training {fit.name}, {len(waiting)} more after it")
                running.append((fit, _start(fit, root, threads), time.monotonic()))
            time.sleep(0.2)
            for item in [item for item in running if item[1].poll() is not None]:
                running.remove(item)
                _conclude(*item, root)
    finally:
        for _, process, _ in running:
            process.terminate()  # saves a checkpoint first
        for _, process, _ in running:
            process.wait()
    return [root / fit.name for fit in fits]


def shipped_keys(config: str) -> dict[str, Any]:
    """What a shipped config says."""
    return yaml.safe_load(shipped_configs()[config].read_text(encoding="utf-8"))


def seconds(run: Path) -> float:
    """Wall time of a finished run in its last process, start included."""
    return float(_record(run)["seconds"])


def _record(run: Path) -> dict[str, Any]:
    """How a run was started, and the seconds that it took or None; empty if it never was."""
    path = run.with_name(f"{run.name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_record(run: Path, fit: Fit, taken: float | None) -> None:
    text = json.dumps({"arguments": fit.arguments(), "seconds": taken}, indent=2) + "\n"
    write_whole(run.with_name(f"{run.name}.json"), lambda file: file.write(text.encode()))


def _finished(fit: Fit, run: Path) -> bool:
    done = _same(fit, run) and _record(run)["seconds"] is not None
    return done and (run / "huggingface").is_dir()


def _same(fit: Fit, run: Path) -> bool:
    return _record(run).get("arguments") == fit.arguments()


def _start(fit: Fit, root: Path, threads: int) -> subprocess.Popen[bytes]:
    run = root / fit.name
    goes_on = _same(fit, run) and any((run / "checkpoints").glob("step=*.ckpt"))
    how = ["--ckpt_path", "last"] if goes_on else ["--run.overwrite", "true"]
    _write_record(run, fit, None)
    command = [sys.executable, "-m", "lit_sparse", "fit", *fit.arguments()]
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    # The run is deaf to a Ctrl-C in the terminal, and ends by `run_fits`: of two signals the second
    # would end it at once, without a checkpoint.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with (root / f"{fit.name}.log").open("ab" if goes_on else "wb") as log:
            return subprocess.Popen(
                [*command, "--run.root", str(root), *how],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )
    finally:
        signal.signal(signal.SIGINT, heard)


def _conclude(fit: Fit, process: subprocess.Popen[bytes], begin: float, root: Path) -> None:
    if process.returncode:
        log = root / f"{fit.name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        raise BadArgument(f"training {fit.name} failed (see {log}): {last}")
    _write_record(root / fit.name, fit, round(time.monotonic() - begin, 1))
