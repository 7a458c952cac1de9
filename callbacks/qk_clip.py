"""Bound attention logits: query and key weights of heads whose logits grow too large are scaled."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from lit_sparse.callbacks.common import sparse_models
from lit_sparse.callbacks.sampled import SampledAttentionMonitor
from lit_sparse.callbacks.sampler import Sample
from lit_sparse.distributed.gradients import gradients_are_whole
from lit_sparse.models import attention_layers


class QKClip(SampledAttentionMonitor):
    """After an optimizer step, scale down the heads whose logits passed a threshold in it.

    Let S be the largest absolute logit of a query head in the sampled rows of a measured step. If
    it is above `threshold`, the head's query weights are multiplied by threshold / S once the step
    is made. Where no other query head shares its key head, queries and keys take the square root of
    that each; where some do, the key head stays as it is and the queries take all of it, as they do
    in Kimi K2 for the part of its keys that heads share. All other heads keep their weights, bit
    for bit. Optimizer state is left alone. Logs `collapse/clipped_heads`: how many.

    Source: QK-Clip of Kimi K2 (arXiv 2507.20534), which looks at all rows of the batch. Sampled
    ones find a largest logit that is a little smaller: raise `rows` if `collapse/logit_max` stays
    above the threshold.

    Args:
        threshold: largest absolute logit that a head may have, in nats.
        every_n_steps, rows, min_context, seed: see `SampledAttentionMonitor`.

    Raises:
        ValueError: a value out of its range; when fitting starts, a model or strategy whose weights
            cannot be clipped.
    """

    def __init__(
        self,
        threshold: float = 100.0,
        every_n_steps: int = 1,
        rows: int = 64,
        min_context: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, rows, min_context, seed)
        if not threshold > 0:
            raise ValueError(f"QKClip threshold must be above 0, got {threshold}")
        self.threshold = threshold
        self._factors: dict[int, Tensor] = {}
        """Layer number -> [heads], of the step that is not made yet."""
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        if not gradients_are_whole(trainer):
            raise ValueError(
                f"QKClip scales whole weights, and {type(trainer.strategy).__name__} shards them "
                "or steps copies: train with ddp or on one device, or remove it from "
                "trainer.callbacks"
            )
        for model in sparse_models(pl_module):
            for layer, module in attention_layers(model):
                if (why := _unfit(module)) is not None:
                    raise ValueError(
                        f"QKClip cannot clip layer {layer} of {type(model).__name__}: {why}; "
                        "remove it from trainer.callbacks"
                    )

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        clipped = 0
        for layer, rows in sample.layers.items():
            # NaN stands for heads that this layer lacks.
            largest = rows.logit_max.amax(0)
            largest = largest[~largest.isnan()]
            clipped += int((largest > self.threshold).sum())
            self._factors[layer] = (self.threshold / largest).clamp(max=1)
        pl_module.log("collapse/clipped_heads", float(clipped))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._step:
            return  # gradients of this step's weights are still being accumulated
        self._step, first = trainer.global_step, 0
        for model in sparse_models(pl_module):
            layers = attention_layers(model)
            for layer, module in layers:
                if (factors := self._factors.get(first + layer)) is not None:
                    clip(module, factors)
            first += len(layers)
        self._factors = {}


@torch.no_grad()
def clip(module: nn.Module, factors: Tensor) -> None:
    """Multiply the logits of an attention module's heads, by its weights.

    Args:
        module: with `q_proj` and `k_proj`.
        factors: [query heads], above 0; a head of factor 1 keeps its weights bit for bit.
    """
    own: Any = module
    shared = own.num_key_value_groups > 1
    parts = (
        [(own.q_proj, factors)]
        if shared
        else [(projection, factors.sqrt()) for projection in (own.q_proj, own.k_proj)]
    )
    for projection, of_heads in parts:
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                by_head = parameter.unflatten(0, (len(of_heads), -1))
                by_head *= of_heads.to(by_head).view(-1, *[1] * (by_head.ndim - 1))


def _unfit(module: nn.Module) -> str | None:
    """Why the logits of an attention module cannot be scaled by its weights, or None."""
    if hasattr(module, "q_norm"):
        return "it has QK-norm, which bounds the logits whatever the weights are"
    projections = [getattr(module, name, None) for name in ("q_proj", "k_proj")]
    if not all(isinstance(projection, nn.Linear) for projection in projections):
        return "its query and key projections are not plain linear layers (adapters, Phi-3)"
    return None
