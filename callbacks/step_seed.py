"""Randomness as a function of the optimizer step."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer


def seed_of(*numbers: int) -> int:
    """A seed below 2^32 drawn from numbers that are not negative; different ones, different
    seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class StepSeed(Callback):
    """Seed PyTorch, NumPy and Python before each micro-batch, so that a run can be resumed exactly.

    The seed is drawn from (`seed`, optimizer step, micro-batch, rank): dropout is a function of the
    step, no state of generators needs saving, and neither monitors nor a validation change it. No
    two ranks have a seed in common, since none have tokens in common, those of one row neither.

    Args:
        seed: not negative. None: the one given to `seed_everything`, or 0.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"StepSeed seed must be >= 0, got {seed}")
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        drawn = seed_of(seed, trainer.global_step, micro_batch, trainer.global_rank)
        torch.manual_seed(drawn)
        np.random.seed(drawn)  # noqa: NPY002 - what others may use
        random.seed(drawn)
