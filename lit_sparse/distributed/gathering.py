"""Whole weights out of shards: those of a model under ZeRO 3, and of DeepSpeed's checkpoints."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_sparse.distributed.checkpoint import TAG, weights_only_loads


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


class StoredTensor(Protocol):
    """A tensor of a checkpoint, which `contiguous` reads."""

    shape: torch.Size
    dtype: torch.dtype

    def contiguous(self) -> Tensor: ...


def checkpoint_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """The weights of a sharded checkpoint by name, of any stage and number of ranks.

    From stage 1 on it is those that the optimizer updates, float32 in bfloat16 training too. At
    stage 3 they stay in their files until they are read; stages 1 and 2 are put together whole.

    Raises:
        ValueError: files are missing or damaged, or DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns where it has to guess
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ValueError(f"{checkpoint} is sharded: reading it needs DeepSpeed") from error
    files, found = checkpoint / TAG, {}
    try:
        with weights_only_loads():
            model = files / "mp_rank_00_model_states.pt"  # whole at stages 0 to 2
            if model.is_file():
                found = torch.load(model, map_location="cpu", mmap=True)["module"]
            if any(files.glob("*_optim_states.pt")):
                # DeepSpeed prints what it does.
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    shards = get_fp32_state_dict_from_zero_checkpoint(
                        str(checkpoint), TAG, lazy_mode=True
                    )
                found = {**found, **shards}
    except Exception as error:  # whatever a reader makes of arbitrary bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{checkpoint} cannot be read: {reason}") from error
    if not found:
        raise ValueError(f"{checkpoint} holds no weights")
    return found
