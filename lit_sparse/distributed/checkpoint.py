"""What sharded checkpoints hold, whether they are whole, and whom they are for.

A sharded checkpoint is a directory of DeepSpeed's own layout with two files besides:

    latest, checkpoint/...   DeepSpeed's: the shards of weights and optimizer states
    run.ckpt                 the rest of Lightning's checkpoint: loops, callbacks, "lit_sparse"; of
                             the first rank
    manifest.json            size and CRC-32 of every file; written last

Only the same number of ranks, at the same ZeRO stage and sequence-parallel size, can go on from it:
the shards are cut for them. Others start from its weights, see `lit-sparse export`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_sparse.files import Sum, sum_of
from lit_sparse.models import named_models
from lit_sparse.models.lora.checkpoints import describe_adapters

TAG = "checkpoint"
RUN = "run.ckpt"
MANIFEST = "manifest.json"


def description(module: nn.Module, sharding: Mapping[str, int] | None) -> dict[str, Any]:
    """What every checkpoint says about itself, under "lit_sparse".

    Args:
        module: whose weights it has.
        sharding: ZeRO `stage`, and the numbers of `data`- and `sequence`-parallel ranks that its
            shards are for; None where it is not sharded.

    Returns:
        `sharding`; `models`: attribute path in the module -> config of each transformers model,
        with the law and the RoPE of the moment; `adapters`: see `describe_adapters`.
    """
    models = {path: model.config.to_dict() for path, model in named_models(module).items()}
    return {
        "sharding": None if sharding is None else dict(sharding),
        "models": models,
        "adapters": describe_adapters(module),
    }


def damage(path: Path, contents: bool = True) -> str | None:
    """What is wrong with a sharded checkpoint, or None.

    Args:
        path: the directory.
        contents: read all of it; otherwise only the sizes are compared.
    """
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        sums = {name: Sum(**written) for name, written in files.items()}
    except FileNotFoundError:
        return f"there is no {MANIFEST}, which is written last"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    with ThreadPoolExecutor(max_workers=8) as threads:
        found = threads.map(partial(_fault, path, contents=contents), sums.items())
    return next((fault for fault in found if fault), None)


def _fault(path: Path, written: tuple[str, Sum], contents: bool) -> str | None:
    name, expected = written
    try:
        if (size := (path / name).stat().st_size) != expected.size:
            return f"{name} has {size} bytes, {expected.size} were written"
        if contents and sum_of(path / name) != expected:
            return f"the checksum of {name} does not match"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def run_state(path: Path) -> dict[str, Any]:
    """All of a sharded checkpoint but weights and optimizer states.

    Raises:
        ValueError: a directory that somebody else wrote.
    """
    try:
        return torch.load(path / RUN, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"ckpt_path: {path} was not written by strategy deepspeed_sparse: there is no {RUN}"
        ) from error


def check_sharding(path: Path, asked: Mapping[str, int] | None) -> None:
    """Refuse to go on from a checkpoint of another sharding.

    Args:
        path: the checkpoint, of any strategy.
        asked: sharding of the run that is to go on, see `description`.

    Raises:
        ValueError: they differ; says what to do.
    """
    saved = run_state(path)["lit_sparse"]["sharding"] if path.is_dir() else None
    if saved == asked:
        return
    if saved is None:
        what, way = "is not sharded", "go on with the strategy that wrote it"
    else:
        what = f"is sharded for {_named(saved)}"
        way = f"use strategy deepspeed_sparse with {_named(saved)}"
    this = "is not sharded" if asked is None else f"is sharded for {_named(asked)}"
    raise ValueError(
        f"ckpt_path: {path} {what}, but this run {this}, and a checkpoint cannot be divided "
        f"anew: {way}, or start a new run from the weights (lit-sparse export, then "
        "--model.pretrained)"
    )


def _named(sharding: Mapping[str, int]) -> str:
    stage, data, sequence = (sharding[key] for key in ("stage", "data", "sequence"))
    return f"stage {stage} on {data} data-parallel x {sequence} sequence-parallel ranks"


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Inside, every `torch.load` loads tensors, plain values and the few classes that DeepSpeed's
    files hold, whatever the call says: DeepSpeed's own would run any code that a file brings.

    Raises:
        ValueError: a file holds something else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (force, forbid)}
    os.environ[force] = "1"
    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):  # type: ignore[attr-defined]
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            "a file of the checkpoint holds more than tensors and plain values, and is not loaded: "
            f"{_refused(error)}"
        ) from error
    finally:
        os.environ.pop(force)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refused(error: Exception) -> str:
    """PyTorch's reason without its advice, which is to load such files nevertheless."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "GLOBAL" in line or "class" in line), lines[0])
