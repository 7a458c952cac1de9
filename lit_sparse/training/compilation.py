"""torch.compile on all of a decoder layer but its attention, which is one operator in the graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import torch
from pytorch_lightning import Trainer
from torch import nn

from lit_sparse.distributed import ranks_of
from lit_sparse.models.support import require_known

BACKEND = "inductor"
"""Of torch.compile."""


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers of a transformers model, in place; gradients are the same up to
    rounding, names of weights are the same. To be called after `set_activations`.

    One graph for all layers that are alike (regional compilation), made at the first step; it
    serves every law, RoPE and packing, and dense attention has one more. Forwards without gradients
    (validation, generation) run as they are, and so do hooks of a layer.

    Raises:
        ValueError: a model whose layers are not known.
    """
    require_known(model)
    for layer in cast(Any, model).base_model.layers:
        # The class's function and the layer apart: a copy of the model has to run its own layers.
        forward = partial(_forward, type(layer).forward, layer)
        if layer.gradient_checkpointing:
            # Around the graph, not in it, wherever this version of transformers would call it.
            layer.gradient_checkpointing = False
            forward = partial(_checkpointed, layer._gradient_checkpointing_func, forward)
        layer.forward = forward


def check_compilation(liger_kernels: bool, tiled_mlp: int | None) -> None:
    """ValueError for keys of a model that exclude `model.compile`."""
    if liger_kernels:
        raise ValueError(
            "model.compile fuses RMSNorm, RoPE and SwiGLU by itself: set model.liger_kernels: "
            "false (model.loss: liger may stay), or model.compile: false"
        )
    if tiled_mlp is not None:
        raise ValueError(
            "model.compile: a graph cannot hold DeepSpeed's tiled MLP, which runs a backward of "
            "its own: set model.tiled_mlp: null (model.loss: tiled may stay), or model.compile: "
            "false"
        )


def check_compiler(trainer: Trainer) -> None:
    """Refuse to train compiled layers where they cannot be compiled or called.

    Raises:
        ValueError: no C++ compiler, ZeRO 3, or ranks that share a row.
    """
    strategy: Any = trainer.strategy
    if getattr(strategy, "zero_stage_3", False):
        raise ValueError(
            "model.compile: ZeRO 3 gathers the parameters of a module when it is called, which a "
            "graph does not show: set model.compile: false, or strategy.stage to 2 or less"
        )
    if ranks_of(trainer).sequence_size > 1:
        raise ValueError(
            "model.compile: ranks that share a row exchange tokens inside of each layer, which no "
            "graph holds: set model.compile: false, or strategy.sequence_parallel: 1"
        )
    if strategy.root_device.type == "cpu" and BACKEND == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "model.compile needs a C++ compiler, and this machine has none: install g++, or "
                "name another one by the environment variable CXX, or set model.compile: false"
            ) from error


def _checkpointed(
    checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    run = partial(forward, **kwargs)
    return checkpoint(run, *args) if torch.is_grad_enabled() else run(*args)


def _forward(forward: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    trains = torch.is_grad_enabled() and kwargs.get("past_key_values") is None
    return (_compiled(forward, BACKEND) if trains else forward)(layer, *args, **kwargs)


@lru_cache
def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(forward, backend=backend, fullgraph=True)
