"""Norms of the gradients of the query and key projections, by layer."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lit_sparse.callbacks.common import sparse_models
from lit_sparse.models import attention_layers

PROJECTIONS = {"query": "q_proj", "key": "k_proj"}


def gradients_are_whole(trainer: Trainer) -> bool:
    """Whether each rank has the whole gradients of all parameters: sharding strategies do not."""
    sharded = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
    return not isinstance(trainer.strategy, sharded)


def projection_gradients(pl_module: LightningModule) -> dict[str, dict[int, Tensor]]:
    """ "query" and "key" -> layer number -> L2 norm of the gradient of that projection.

    To be asked between backward and clipping, in `on_before_optimizer_step`: then it is the mean
    over micro-batches and ranks, and a gradient scaler has taken its factor out. Adapters in a
    projection (LoRA) are part of it. A projection that is not trained, or got no gradient, is left
    out.
    """
    found: dict[str, dict[int, Tensor]] = {name: {} for name in PROJECTIONS}
    first = 0
    for model in sparse_models(pl_module):
        layers = attention_layers(model)
        for name, projection in PROJECTIONS.items():
            for layer, module in layers:
                parameters = getattr(module, projection).parameters()
                gradients = [p.grad for p in parameters if p.grad is not None]
                if gradients:
                    found[name][first + layer] = torch.nn.utils.get_total_norm(gradients)
        first += len(layers)
    return found


def total(norms: dict[int, Tensor]) -> Tensor:
    """The norm over all layers."""
    return torch.stack(list(norms.values())).norm()
