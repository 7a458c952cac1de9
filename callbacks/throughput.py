"""Tokens per second and memory of training."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lit_sparse.distributed import ranks_of


class Throughput(Callback):
    """Log `train/tokens_per_second` (all ranks) and `train/memory_gib` (peak of the process with
    the highest one).

    Time outside of training (validation, checkpoints) is not counted; loading a batch is. Tokens
    are counted from the batch's `input_ids`, a row that ranks share once.

    Args:
        window: batches that a rate is averaged over.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Throughput window must be >= 1 batch, got {window}")
        self.window = window
        self._recent: list[tuple[int, float]] = []
        self._mark: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._mark is None or not isinstance(batch, dict) or "input_ids" not in batch:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        tokens = batch["input_ids"].numel() * ranks_of(trainer).data_size
        self._recent = [*self._recent[-self.window + 1 :], (tokens, now - self._mark)]
        self._mark = now
        rate = sum(t for t, _ in self._recent) / sum(s for _, s in self._recent)
        pl_module.log("train/tokens_per_second", rate)
        peak = _peak_gib(pl_module.device)
        pl_module.log("train/memory_gib", peak, reduce_fx="max", sync_dist=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._mark = None

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self._recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent = [tuple(batch) for batch in state_dict["recent"]]


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
