"""Gradients of a step wherever they are: whole on every rank, or in shards of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn


def engine_of(trainer: Trainer) -> Any:
    """The DeepSpeed engine that trains, or None under another strategy."""
    strategy = trainer.strategy
    engine = strategy.model if isinstance(strategy, DeepSpeedStrategy) else None
    return engine if hasattr(engine, "get_global_grad_norm") else None


def check_counting(trainer: Trainer) -> None:
    """Refuse a strategy whose division of gradients `gradient_divisor` does not know.

    Raises:
        ValueError: Lightning's own for DeepSpeed.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and not hasattr(strategy, "gradient_divisor"):
        raise ValueError(
            f"trainer.strategy: Lightning's {type(strategy).__name__} divides gradients by the "
            "accumulation twice: set deepspeed_sparse, or "
            "lit_sparse.distributed.DeepSpeedSparseStrategy"
        )


def gradients_are_whole(trainer: Trainer) -> bool:
    """Whether each rank has the whole gradients of all parameters, in `parameter.grad`."""
    if (engine := engine_of(trainer)) is not None:
        # Those that wrap it keep gradients in buffers of their own.
        return isinstance(engine.optimizer, torch.optim.Optimizer)
    sharded = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
    return not isinstance(trainer.strategy, sharded)


def overflow_is_expected(trainer: Trainer) -> bool:
    """Whether gradients are those of a scaled loss, in float16: that some of them overflow is how
    the scale is found, and the step is skipped by whoever scales.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    engine = engine_of(trainer)
    return (scaler is not None and scaler.is_enabled()) or (
        engine is not None and engine.fp16_enabled()
    )


def own_gradient(trainer: Trainer, parameter: nn.Parameter) -> Tensor | None:
    """What this rank has of a parameter's gradient: the gradient; or, where ZeRO shards it, the L2
    norm of this rank's shard, a scalar. None where it has nothing.

    To be asked in `on_before_optimizer_step`: of the whole step, before clipping, and times the
    loss scale in float16 under DeepSpeed. Asks no other rank.
    """
    engine = engine_of(trainer)
    if engine is not None and engine.zero_optimization():
        if not (engine.is_gradient_accumulation_boundary() and _trains(engine, parameter)):
            return None
        return _norm_of_shard(engine.optimizer, parameter)
    gradient = parameter.grad
    # A sparse one is an embedding's.
    return gradient.coalesce().values() if gradient is not None and gradient.is_sparse else gradient


def gradient_norms(
    trainer: Trainer, parameters: Sequence[nn.Parameter]
) -> list[Tensor | None] | None:
    """L2 norm of the gradient of each parameter, None where it got none; the same on every rank.

    As `own_gradient`, but without the loss scale. Where ZeRO shards gradients all ranks have to
    call it: one all-reduce of as many numbers. None where they are sharded otherwise (FSDP).
    """
    engine = engine_of(trainer)
    if engine is None and not gradients_are_whole(trainer):
        return None
    own = (own_gradient(trainer, parameter) for parameter in parameters)
    norms = [None if gradient is None else _norm(gradient) for gradient in own]
    if engine is None or not parameters:
        return norms
    if engine.zero_optimization():
        squares = torch.zeros(len(norms), device=trainer.strategy.root_device)
        for i, norm in enumerate(norms):
            if norm is not None:
                squares[i] = norm.square()
        whole = trainer.strategy.reduce(squares, reduce_op="sum").sqrt()
        norms = [x if _trains(engine, p) else None for x, p in zip(whole, parameters, strict=True)]
    scale = float(getattr(engine.optimizer, "loss_scale", 1.0))
    return [None if norm is None else norm / scale for norm in norms]


def _trains(engine: Any, parameter: Any) -> bool:
    """Whether ZeRO's optimizer has a parameter."""
    if hasattr(parameter, "ds_id"):
        return engine.optimizer.get_param_id(parameter) in engine.optimizer.grad_position
    return hasattr(parameter, "_hp_mapping")


def _norm_of_shard(optimizer: Any, parameter: Any) -> Tensor | None:
    if getattr(optimizer, "norm_for_param_grads", None) is not None:
        # Offloaded: ZeRO has taken the norms on the gradients' way to the CPU.
        known = optimizer.norm_for_param_grads.get(optimizer.get_param_id(parameter))
        return None if known is None else torch.as_tensor(known, device=parameter.device)
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        shard = safe_get_local_grad(parameter)
    elif (place := parameter._hp_mapping) is None:
        return None
    else:
        shard = place.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        own = place.lp_fragment_address
        if len(shard) > own.numel:  # BF16_Optimizer keeps whole gradients on every rank
            shard = shard[own.start : own.start + own.numel]
    return _norm(shard)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


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

    Raises:
        NotImplementedError: ZeRO keeps them, under a strategy that is not ours.
    """
    discard = getattr(trainer.strategy, "discard_step", None)
    engine = engine_of(trainer)
    if discard is not None:
        discard()
    elif engine is not None and engine.zero_optimization():
        raise NotImplementedError(
            f"{type(trainer.strategy).__name__} cannot throw an optimizer step away: train with "
            "lit_sparse.distributed.DeepSpeedSparseStrategy"
        )
    else:
        optimizer.zero_grad(set_to_none=True)
