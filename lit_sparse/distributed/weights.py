"""Weights that ZeRO 3 has sharded: their shapes, and their values on one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
