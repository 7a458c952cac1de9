"""How adapters train beside frozen weights: in which precision, with which memory features."""

from __future__ import annotations

from typing import Any, cast

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn


def frozen_dtype(strategy: Any) -> torch.dtype:
    """The dtype to load weights in that stay as they are beside float32 adapters.

    Under bf16-mixed bfloat16: autocast rounds weights to it before each product anyway, and a
    float32 copy is for optimizers.

    Args:
        strategy: of the trainer, or None. DeepSpeed casts what it is given.

    Raises:
        ValueError: a precision that would cast the adapters too.
    """
    if strategy is None or isinstance(strategy, DeepSpeedStrategy):
        return torch.float32
    precision = str(strategy.precision_plugin.precision)
    if precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision: {precision} would train the adapters of model.lora in half "
            "precision, in which small steps are lost to rounding: set bf16-mixed, "
            "where the frozen weights are bfloat16 and the adapters float32 (deepspeed_sparse "
            "takes bf16-true: its optimizer keeps float32 copies)"
        )
    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32


def check_tiled_dropout(model: nn.Module, tiled_mlp: bool, tiled_loss: bool) -> None:
    """Refuse dropout in adapters that DeepSpeed's tiled computations run twice.

    The backward computes each tile again and draws anew what is dropped: its gradients would be
    those of another forward. Activation checkpointing restores the generator, and is right.

    Raises:
        ValueError: names the settings.
    """
    decoder = cast(Any, model).base_model
    for key, tiled, modules in (
        ("model.tiled_mlp", tiled_mlp, [layer.mlp for layer in decoder.layers]),
        ("model.loss: tiled", tiled_loss, [cast(Any, model).get_output_embeddings()]),
    ):
        if tiled and any(".lora_A." in f".{n}" for m in modules for n, _ in m.named_parameters()):
            raise ValueError(
                f"model.lora.dropout with {key}: the backward would compute each tile again with "
                "other inputs dropped; set model.lora.dropout: 0, or leave the layers that are "
                "tiled out of model.lora.targets"
            )
