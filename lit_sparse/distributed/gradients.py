"""Gradients of a step wherever they are: whole on every rank, or in shards of DeepSpeed's."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor


def engine_of(trainer: Trainer) -> Any:
    """The DeepSpeed engine that trains, or None under another strategy."""
    strategy = trainer.strategy
    engine = strategy.model if isinstance(strategy, DeepSpeedStrategy) else None
    return engine if hasattr(engine, "get_global_grad_norm") else None


def gradients_are_whole(trainer: Trainer) -> bool:
    """Whether each rank has the whole gradients of all parameters, in `parameter.grad`."""
    if (engine := engine_of(trainer)) is not None:
        # Those that wrap it keep gradients in buffers of their own.
        return isinstance(engine.optimizer, torch.optim.Optimizer)
    sharded = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
    return not isinstance(trainer.strategy, sharded)


def norm_of_last_step(trainer: Trainer) -> Tensor | None:
    """L2 norm of the gradients, before clipping, of the optimizer step that a DeepSpeed engine has
    just made, 0 for one that was discarded; None where it made none, or does not know.
    """
    engine = engine_of(trainer)
    if getattr(trainer.strategy, "discarded", False) and not gradients_are_whole(trainer):
        return torch.zeros(())
    if engine is None or not engine.was_step_applied():
        return None
    norm = engine.get_global_grad_norm()
    return None if norm is None else torch.as_tensor(norm, dtype=torch.float32)


def discard_step(trainer: Trainer, optimizer: Any) -> None:
    """Throw away the gradients of the coming optimizer step: weights and optimizer states stay.

    To be called on every rank, in `on_before_optimizer_step`.
    """
    discard = getattr(trainer.strategy, "discard_step", None)
    if discard is not None:
        discard()
    else:
        optimizer.zero_grad(set_to_none=True)
