"""What the backward needs of each layer: kept, computed again, or its input in CPU memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

Activations = Literal["keep", "recompute", "offload"]
"""What happens to the activations that a backward needs."""


def set_activations(model: nn.Module, kind: str) -> None:
    """Say what a transformers model keeps for its backward; gradients are the same.

    Args:
        model: its layers are checkpointed by transformers' own gradient checkpointing.
        kind: "keep": all that autograd saves, as the model is built. "recompute": the input
            [B, T, D] of each layer; the rest is computed again, layer by layer, in the backward.
            "offload": the same, and those inputs wait in CPU memory, pinned where there is a GPU.

    Raises:
        ValueError: another kind, or a model that cannot be checkpointed.
    """
    if kind not in get_args(Activations):
        names = ", ".join(get_args(Activations))
        raise ValueError(f"model.activations must be one of {names}, got {kind!r}")
    if kind == "keep":
        return
    function = _offloaded if kind == "offload" else checkpoint
    # transformers' gradient_checkpointing_enable takes no function of ours in all of 5.x.
    model._set_gradient_checkpointing(  # type: ignore[operator]
        enable=True, gradient_checkpointing_func=partial(function, use_reentrant=False)
    )


def _offloaded(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    # A non-reentrant checkpoint saves its inputs by the hooks that are around it, and nothing else.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, **options)
