"""Checkpoints of DeepSpeed runs: sharded directories, and one file with the whole weights.

A sharded checkpoint is a directory of DeepSpeed's own layout with two files besides:

    latest, checkpoint/...   DeepSpeed's: the shards of weights and optimizer states
    run.ckpt                 the rest of Lightning's checkpoint: loops, callbacks, "lit_sparse"; of
                             the first rank
    manifest.json            size and CRC-32 of every file; written last

It can be read by the same ranks at the same ZeRO stage only: shards are cut for them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.files import Sum, publish, remove, sum_of, write_synced
from lit_sparse.models import named_models

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
        `sharding`, and `models`: attribute path in the module -> config of each transformers model,
        with the law and the RoPE of the moment.
    """
    models = {path: model.config.to_dict() for path, model in named_models(module).items()}
    return {"sharding": None if sharding is None else dict(sharding), "models": models}


# -- what is in a checkpoint --


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
        f"ckpt_path: {path} {what}, but this run {this}, and optimizer states cannot be divided "
        f"anew: {way}, or start a new run from the weights (lit-sparse export, then "
        "--model.pretrained)"
    )


def _named(sharding: Mapping[str, int]) -> str:
    stage, data, sequence = (sharding[key] for key in ("stage", "data", "sequence"))
    return f"stage {stage} on {data} data-parallel x {sequence} sequence-parallel ranks"


# -- writing --


def save_sharded(engine: Any, state: Mapping[str, Any], path: Path) -> None:
    """Write a sharded checkpoint, which appears whole or not at all. Collective.

    Args:
        engine: DeepSpeed's.
        state: all else of Lightning's checkpoint; that of the first rank is written.
        path: the same on every rank, on a file system that all of them see.
    """
    first = torch.distributed.get_rank() == 0
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if first:
            remove(unfinished)
        own: dict[str, Sum] = {}
        with _summed(engine, unfinished, own):
            engine.save_checkpoint(str(unfinished), tag=TAG)
        sums: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(sums, own)
        if first:
            _complete(
                unfinished, state, {name: each for part in sums for name, each in part.items()}
            )
            publish(unfinished, path)
        torch.distributed.barrier()
    except BaseException:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _summed(engine: Any, directory: Path, sums: dict[str, Sum]) -> Iterator[None]:
    """Inside, files of the engine reach the disk, and `sums` gets theirs by name."""
    writer = engine.checkpoint_engine

    def save(state_dict: Any, path: str) -> None:
        written = write_synced(Path(path), lambda file: torch.save(state_dict, file))
        sums[str(Path(path).relative_to(directory))] = written

    writer.save = save
    try:
        yield
    finally:
        del writer.save


def _complete(directory: Path, state: Mapping[str, Any], sums: dict[str, Sum]) -> None:
    sums[RUN] = write_synced(directory / RUN, lambda file: torch.save(dict(state), file))
    others = (p for p in sorted(directory.rglob("*")) if p.is_file())
    for name, path in ((str(p.relative_to(directory)), p) for p in others):
        if name not in sums:  # DeepSpeed writes small ones by itself
            sums[name] = sum_of(path)
    manifest = {"files": {name: asdict(each) for name, each in sums.items()}}
    text = json.dumps(manifest, indent=2).encode()
    write_synced(directory / MANIFEST, lambda file: file.write(text))


# -- reading --


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


def load_sharded(engine: Any, path: Path, fitting: bool, strict: bool) -> dict[str, Any]:
    """Load weights, and optimizer states where a run goes on, into an engine. Collective.

    Returns:
        all else of the checkpoint.
    """
    with weights_only_loads():
        if fitting or engine.zero_optimization_stage() < 3:
            engine.load_checkpoint(
                str(path),
                tag=TAG,
                load_module_strict=strict,
                load_optimizer_states=fitting,
                load_lr_scheduler_states=False,
            )
        else:
            _load_own_shards(engine, path / TAG, strict)
    return run_state(path)


def _load_own_shards(engine: Any, directory: Path, strict: bool) -> None:
    """Load the weights of stage 3 into an engine that does not train.

    DeepSpeed would put them together, all of them, in the memory of each rank.
    """
    rank = torch.distributed.get_rank()

    def shard(kind: str) -> dict[str, Any]:
        (file,) = directory.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
        return torch.load(file, map_location="cpu", mmap=True)

    parameters = dict(engine.module.named_parameters())
    for parameter in parameters.values():
        if parameter.numel():  # small ones stay whole between steps
            parameter.partition()
    states = shard("model")
    engine.load_module_state_dict(checkpoint=states, strict=strict)  # buffers, frozen parameters
    flat = shard("optim")["optimizer_state_dict"]["fp32_flat_groups"]
    for names, group in zip(states["param_shapes"], flat, strict=True):
        start = 0
        for name in names:
            own = parameters[name].ds_tensor
            own.copy_(group[start : start + own.numel()])
            start += own.numel()


# -- the whole weights --


@torch.no_grad()
def full_state_dict(engine: Any) -> dict[str, Any]:
    """The state dict of an engine's module, on the CPU of the first rank; {} on the others.

    One parameter at a time is gathered. Values are those that the optimizer goes on from: float32
    where it has such a copy. Tied parameters share one tensor. Collective.
    """
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    first = torch.distributed.get_rank() == 0
    trains = engine.client_optimizer is not None
    found: dict[str, Any] = {}
    copies: dict[int, Tensor] = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            found[name] = value
            continue
        if id(value) not in copies:
            whole = safe_get_full_fp32_param(value) if trains and value.requires_grad else None
            with GatheredParameters([value] if whole is None else []):
                source = value if whole is None else whole
                copies[id(value)] = source.detach().cpu().clone() if first else torch.empty(0)
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
        value, shape = state_dict[name], getattr(target, "ds_shape", target.shape)
        if shape != value.shape:
            raise RuntimeError(f"{name}: {list(value.shape)} in the checkpoint, not {list(shape)}")
        with GatheredParameters([target], modifier_rank=0):
            if first or not hasattr(target, "ds_id"):
                target.copy_(value)
