"""Writing and reading the shards of a DeepSpeed engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lit_sparse.distributed.checkpoint import MANIFEST, RUN, TAG, run_state, weights_only_loads
from lit_sparse.files import Sum, publish, remove, sum_of, sync, write_synced


def save_sharded(
    engine: Any, state: Mapping[str, Any], path: Path, left_out: Collection[str] = ()
) -> None:
    """Write a sharded checkpoint, which appears whole or not at all. Collective.

    Args:
        engine: DeepSpeed's.
        state: all else of Lightning's checkpoint; that of the first rank is written.
        path: the same on every rank, on a file system that all of them see.
        left_out: names of frozen weights that the files shall not hold: none, or all frozen ones.
    """
    first = torch.distributed.get_rank() == 0
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        if first:
            remove(unfinished)
        own: dict[str, Sum] = {}
        with _summed(engine, unfinished, own, left_out):
            engine.save_checkpoint(
                str(unfinished), tag=TAG, exclude_frozen_parameters=bool(left_out)
            )
        sums: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(sums, own)
        if first:
            _complete(unfinished, state, {name: s for part in sums for name, s in part.items()})
            publish(unfinished, path)
        torch.distributed.barrier()
    except BaseException:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _summed(
    engine: Any, directory: Path, sums: dict[str, Sum], left_out: Collection[str]
) -> Iterator[None]:
    """Inside, files of the engine reach the disk, and `sums` gets theirs by name."""
    writer = engine.checkpoint_engine

    def save(state_dict: Any, path: str) -> None:
        if left_out and "module" in state_dict:  # DeepSpeed leaves one of two tied names in
            module = state_dict["module"]
            kept = {name: module[name] for name in module if name not in left_out}
            state_dict = {**state_dict, "module": kept}
        written = write_synced(Path(path), lambda file: torch.save(state_dict, file))
        sums[str(Path(path).relative_to(directory))] = written

    writer.save = save
    try:
        yield
    finally:
        del writer.save


def _complete(directory: Path, state: Mapping[str, Any], sums: dict[str, Sum]) -> None:
    if elsewhere := [name for name in sums if not (directory / name).is_file()]:
        raise RuntimeError(
            f"{directory.parent} is not the same directory on every node, {elsewhere[0]} is not "
            "there: keep checkpoints (run.root) on a file system that all nodes share"
        )
    sums[RUN] = write_synced(directory / RUN, lambda file: torch.save(dict(state), file))
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and name not in sums:  # DeepSpeed writes small ones by itself
            sync(path)
            sums[name] = sum_of(path)
    manifest = {"files": {name: asdict(each) for name, each in sums.items()}}
    text = json.dumps(manifest, indent=2).encode()
    write_synced(directory / MANIFEST, lambda file: file.write(text))


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
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def shard(kind: str) -> dict[str, Any]:
        (file,) = directory.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
        return torch.load(file, map_location="cpu", mmap=True)

    states = shard("model")
    shapes = dict(states["frozen_param_shapes"] or {})
    parts = dict(states["frozen_param_fragments"] or {})
    flat = shard("optim")["optimizer_state_dict"]["fp32_flat_groups"]
    for group_shapes, group in zip(states["param_shapes"], flat, strict=True):
        sizes = [-(-shape.numel() // world) for shape in group_shapes.values()]
        parts.update(zip(group_shapes, group.split(sizes), strict=True))
        shapes.update(group_shapes)
    parameters = {
        name: p for name, p in engine.module.named_parameters() if strict or name in parts
    }
    there = {name: parameter.ds_shape for name, parameter in parameters.items()}
    if there != {name: shape for name, shape in shapes.items() if strict or name in there}:
        other = sorted(name for name in {*there, *shapes} if there.get(name) != shapes.get(name))
        raise RuntimeError(f"the checkpoint's shards are of another model: {', '.join(other)}")
    for name, parameter in parameters.items():
        if parameter.numel():  # small ones stay whole between steps
            parameter.partition()
        parameter.ds_tensor.copy_(parts[name])
    engine.module.load_state_dict(states["module"], strict=strict)  # buffers: the rest is empty
