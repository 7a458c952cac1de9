"""Hugging Face directories of trained models: weights in shards, config, tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lit_sparse.files import publish, remove, sync

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_SIZE = "5GB"
"""Of a file of weights: so much is in memory at a time."""


class Savable(Protocol):
    """A tokenizer, of transformers or of `lit_sparse.data`."""

    def save_pretrained(self, directory: str | Path) -> Any: ...


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as a file holds them: tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def check_replaceable(directory: Path) -> None:
    """ValueError if something is there that is not a model, and would be lost."""
    if (directory / "config.json").is_file() or not directory.exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise ValueError(f"{directory} is there, and holds no model that could be replaced")


def write_model(
    model: PreTrainedModel,
    directory: Path,
    weights: Mapping[str, Tensor],
    read: Callable[[str], Tensor | None],
    *,
    tokenizer: Savable | None = None,
    on_disk: Callable[[Callable[[], None]], None] = lambda action: action(),
    shard_size: str = SHARD_SIZE,
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads.

    It appears whole or not at all; one that is there is replaced. Where several ranks hold the
    weights, all of them call this.

    Args:
        model: its config, which holds law and RoPE, and generation config are written.
        directory: where to.
        weights: name -> a tensor, on the meta device, of the shape and dtype to be stored.
        read: gives the values by name, on the CPU, on the rank that writes. Called with all names,
            one file of `shard_size` after the other, in the same order on all ranks.
        tokenizer: written besides.
        on_disk: calls what it is given, on the rank that writes; raises on all ranks if that fails.
        shard_size: of a file, e.g. "5GB".
    """

    def write_others(unfinished: Path) -> None:
        _write_configs(model, unfinished, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)

    write_tensors(
        directory, weights, read, write_others, stem="model", on_disk=on_disk, shard_size=shard_size
    )


def write_tensors(
    directory: Path,
    weights: Mapping[str, Tensor],
    read: Callable[[str], Tensor | None],
    write_others: Callable[[Path], None],
    *,
    stem: str,
    on_disk: Callable[[Callable[[], None]], None],
    shard_size: str,
) -> None:
    """Write a directory of safetensors files and what belongs to them, whole or not at all.

    Args:
        directory, weights, read, on_disk, shard_size: see `write_model`.
        write_others: writes config.json, and other files, to the directory that it is given.
        stem: of the files' names: "model" for model.safetensors, or for its shards and an index.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(
        dict(weights), filename_pattern=stem + "{suffix}.safetensors", max_shard_size=shard_size
    )
    unfinished = directory.with_name(f".{directory.name}.tmp")

    def begin() -> None:
        remove(unfinished)
        unfinished.mkdir(parents=True)
        write_others(unfinished)
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (unfinished / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def end() -> None:
        for path in unfinished.rglob("*"):
            sync(path)
        publish(unfinished, directory)

    try:
        on_disk(begin)
        for file, names in plan.filename_to_tensors.items():
            shard = {name: read(name) for name in names}
            on_disk(partial(_write_shard, unfinished / file, shard, weights))
        on_disk(end)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_configs(model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor]) -> None:
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _write_shard(
    path: Path, shard: Mapping[str, Tensor | None], weights: Mapping[str, Tensor]
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {
        name: tensor.to(weights[name].dtype).contiguous()
        for name, tensor in shard.items()
        if tensor is not None
    }
    try:
        save_file(whole, path, metadata={"format": "pt"})
        # safetensors lets nobody but the owner read its files.
        shutil.copymode(next(path.parent.glob("*config.json")), path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
