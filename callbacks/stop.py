"""SIGTERM and Ctrl-C as a request to stop between two optimizer steps."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import torch
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn


class StopSignals:
    """Remembers the first signal that asks to stop; a second one ends the process at once.

    Takes the place of Lightning's handlers while a run trains: those stop after the micro-batch, in
    the middle of an optimizer step, and each rank by itself. In a SLURM job with automatic
    requeueing the signal that Lightning takes for it counts too.
    """

    def __init__(self) -> None:
        self._received = 0
        self._owner = 0
        self._replaced: dict[int, Any] = {}
        self._requeue: int | None = None

    def install(self, trainer: Trainer) -> None:
        self._received, self._owner = 0, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)
        for number in (signal.SIGTERM, signal.SIGINT, self._requeue):
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._replaced[number] = signal.signal(number, self._receive)

    def restore(self) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._replaced = {}

    def agreed(self, trainer: Trainer) -> int:
        """The signal that any rank has received, or 0: the same on all ranks, a collective call."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def requeue(self, trainer: Trainer, number: int) -> None:
        """Hand a SLURM job back to its queue if the signal asked for that."""
        if number != self._requeue or not trainer.is_global_zero:
            return
        array, task = (os.environ.get(f"SLURM_ARRAY_{key}_ID") for key in ("JOB", "TASK"))
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            rank_zero_warn(f"job {job} was not requeued: {error}")

    def _receive(self, number: int, frame: Any) -> None:
        ours = os.getpid() == self._owner
        if ours and not self._received:
            self._received = number
            name = signal.Signals(number).name
            # Not print: the signal may come in the middle of one.
            os.write(2, f"\n{name}: stopping after this step; again to stop at once\n".encode())
        elif ours or number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A data worker, which a Ctrl-C in the terminal reaches too, must finish the step.
