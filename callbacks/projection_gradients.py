"""Norms of the gradients of the query and key projections, by layer."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lit_sparse.callbacks.common import sparse_models
from lit_sparse.distributed.gradients import gradient_norms
from lit_sparse.models import attention_layers, law_layers

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "query_key_value": "qkv_proj"}
"""Phi-3 has all three in one matrix."""


def projection_gradients(
    trainer: Trainer, pl_module: LightningModule
) -> dict[str, dict[int, Tensor]] | None:
    """Name of `PROJECTIONS` -> layer number -> L2 norm of the gradient of that projection, of the
    layers that obey a law.

    To be asked on every rank between backward and clipping, in `on_before_optimizer_step`: then it
    is the mean over micro-batches and ranks, and a gradient scaler has taken its factor out.
    Adapters in a projection (LoRA) are part of it. A projection that is not trained, or got no
    gradient, is left out. None where the strategy shards gradients and nobody puts them together.
    """
    places, parameters, first = [], [], 0
    for model in sparse_models(pl_module):
        layers, obeying = attention_layers(model), law_layers(model)
        for name, projection in PROJECTIONS.items():
            for layer, module in layers:
                if layer in obeying and hasattr(module, projection):
                    own = list(getattr(module, projection).parameters())
                    places += [(name, first + layer)] * len(own)
                    parameters += own
        first += len(layers)
    norms = gradient_norms(trainer, parameters)
    if norms is None:
        return None
    found: dict[str, dict[int, Tensor]] = {name: {} for name in PROJECTIONS}
    for (name, layer), norm in zip(places, norms, strict=True):
        if norm is not None:
            before = found[name].get(layer)
            found[name][layer] = norm if before is None else torch.hypot(before, norm)
    return found


def total(norms: dict[int, Tensor]) -> Tensor:
    """The norm over all layers."""
    return torch.stack(list(norms.values())).norm()
