"""The whole weights of a model in training, whatever they are sharded into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a parameter, also where this rank has a part of it only."""
    shape: Any = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def whole_tensor(tensor: Tensor, wanted: bool = True) -> Tensor | None:
    """The values of a parameter or buffer on the CPU.

    Args:
        tensor: if ZeRO 3 has sharded it, all ranks have to call this.
        wanted: whether this rank asks for the values; None is returned where it does not.
    """
    if not hasattr(tensor, "ds_id"):
        return tensor.detach().cpu() if wanted else None
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        # What was gathered is freed at the end, on a CPU as well.
        return tensor.detach().to("cpu", copy=True) if wanted else None


@torch.no_grad()
def full_state_dict(engine: Any, but: Collection[str] = ()) -> dict[str, Any]:
    """The state dict of an engine's module, on the CPU of the first rank; {} on the others.

    One parameter at a time is gathered. Weights that train in half precision are given in float32,
    as the optimizer of stages 1 to 3 has them. Tied parameters share one tensor. Names in `but` are
    left out. Collective.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    first = torch.distributed.get_rank() == 0
    trains = engine.client_optimizer is not None
    found: dict[str, Any] = {}
    copies: dict[int, Tensor | None] = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if name in but:
            continue
        if not isinstance(value, Tensor):
            found[name] = value
            continue
        if id(value) not in copies:
            trained = safe_get_full_fp32_param(value) if trains and value.requires_grad else None
            copies[id(value)] = whole_tensor(value if trained is None else trained, wanted=first)
        found[name] = copies[id(value)]
    return found if first else {}


@torch.no_grad()
def load_full_state_dict(engine: Any, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Load such a state dict, which every rank can read, into an engine's module. Collective.

    Raises:
        RuntimeError: names (where `strict`) or shapes differ.
    """
    from deepspeed.runtime.zero import GatheredParameters

    module: nn.Module = engine.module
    if engine.zero_optimization_stage() < 3:
        module.load_state_dict(state_dict, strict=strict)
        return
    own = module.state_dict(keep_vars=True)
    if strict and (other := own.keys() ^ state_dict.keys()):
        raise RuntimeError(
            f"only in the model or only in the checkpoint: {', '.join(sorted(other))}"
        )
    first = torch.distributed.get_rank() == 0
    for name, target in own.items():
        if name not in state_dict or not isinstance(target, Tensor):
            continue
        value, shape = state_dict[name], whole_shape(target)
        if shape != value.shape:
            raise RuntimeError(f"{name}: {list(value.shape)} in the checkpoint, not {list(shape)}")
        with GatheredParameters([target], modifier_rank=0):
            if first or not hasattr(target, "ds_id"):
                target.copy_(value)
