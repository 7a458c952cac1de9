"""The whole weights of a sharded checkpoint, read by one process."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lit_sparse.distributed.checkpoint import TAG, weights_only_loads


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
