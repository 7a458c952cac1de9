"""Loading pretrained weights into shards (ZeRO 3): no rank ever has the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lit_sparse.models import (
    SUPPORTED,
    model_without_weights,
    pretrained_config,
    pretrained_generation,
    rebuild_rope,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that follow from the config; older versions of transformers saved them."""

_FLOATS = ("F64", "F32", "F16", "BF16")


def load_pretrained(
    directory: str | Path, config: Mapping[str, Any], trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a causal language model from a local directory, sharded from the start.

    Rank 0 reads one tensor after the other; DeepSpeed sends it to all ranks, which keep their part
    of it. The names in the files have to be those of the model: what transformers renames or fuses
    when it loads a checkpoint is not done here: that of Mixtral's and Qwen3-MoE's experts is
    refused, the other `SUPPORTED` models need none.

    Args:
        directory: as `save_pretrained` writes it. Every rank reads the headers of its files.
        config: of DeepSpeed, with ZeRO stage 3; it decides the dtype of the weights.
        trust_remote_code: run Python code that the directory brings.

    Raises:
        ValueError: on every rank: there is no model, or its tensors are not those of its config;
            the message names tensor and file.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    files = TensorFiles(weight_files(directory))
    with _outside_zero_init():
        model = _without_weights(directory, _dtype(config), trust_remote_code)
        parameters = _parameters(model)
        _check(directory, parameters, files)
        # One for all: temporary ones would leave holes of their size between the shards.
        largest = max(parameter.numel() for _, parameter in parameters)
        room = torch.empty(largest, dtype=model.dtype)
        for names, empty in parameters:
            values = room[: empty.numel()].view(empty.shape)
            if torch.distributed.get_rank() == 0:
                values.copy_(files.read(next(name for name in names if name in files.shapes)))
            parameter = nn.Parameter(values)
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=dict(config)
            )
            for name in names:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)
        # The engine moves nothing of a model that is sharded already.
        _compute_buffers(model, torch.device(get_accelerator().current_device_name()))
    return model


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """The buffers that no file has: they follow from the config."""
    rebuild_rope(model, device)
    for module in model.modules():
        if (factor := getattr(module, "scalar_embed_scale", None)) is not None:  # Gemma
            cast(Any, module).embed_scale = torch.tensor(factor, device=device)
    if empty := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise NotImplementedError(
            f"ZeRO stage 3 cannot compute {empty[0]} of this {type(model).__name__}: set "
            "strategy.stage to 2"
        )


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(key, {}).get("enabled"):
            return dtype
    return torch.float32


@contextmanager
def _outside_zero_init() -> Iterator[None]:
    """Inside, modules are built as they always are, although Lightning has entered DeepSpeed's
    `zero.Init`, which would allocate each weight whole, on every rank, to shard noise.
    """
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


def _without_weights(
    directory: str | Path, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = pretrained_config(directory, trust_remote_code)
    kind = config.model_type
    if kind in SUPPORTED and get_checkpoint_conversion_mapping(kind):
        raise ValueError(
            f"model.pretrained: {directory} is of model_type {kind}, whose files hold its experts "
            "one by one: they are put together where the model is loaded whole, which ZeRO stage "
            "3 does not do; set strategy.stage to 2"
        )
    if kind not in SUPPORTED:
        raise ValueError(
            f"model.pretrained: {directory} is of model_type {kind}; ZeRO stage 3 loads "
            f"{', '.join(SUPPORTED)} (set strategy.stage to 2 for other models)"
        )
    model = model_without_weights(config, dtype, trust_remote_code)
    if (generation := pretrained_generation(directory)) is not None:
        model.generation_config = generation
    return model.eval()


def _parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with its names: tied ones have several."""
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


class TensorFiles:
    """The tensors of some safetensors files, read one at a time; ValueError for a damaged file."""

    def __init__(self, paths: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in paths:
            try:
                self._open[path] = file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"model.pretrained: {path} is damaged: {error}") from error
            for name in file.keys():  # noqa: SIM118 - not a mapping
                header = file.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
                self.files[name] = path

    def read(self, name: str) -> Tensor:
        return self._open[self.files[name]].get_tensor(name)


def _check(
    directory: str | Path, parameters: list[tuple[list[str], nn.Parameter]], files: TensorFiles
) -> None:
    known = {name for names, _ in parameters for name in names}
    for name, file in files.files.items():
        if name not in known and not _COMPUTED.search(name):
            raise ValueError(
                f"model.pretrained: {file} has a tensor {name}, which its config.json does not "
                "(a model is loaded in shards under the names that transformers saves today; load "
                "it once with transformers, and save_pretrained it)"
            )
    for names, parameter in parameters:
        present = [name for name in names if name in files.files]
        if not present:
            raise ValueError(
                f"model.pretrained: the files of {directory} lack the tensor {names[0]} "
                f"{list(parameter.shape)}"
            )
        if len(present) > 1:
            raise ValueError(
                f"model.pretrained: {files.files[present[1]]} has {' and '.join(present)}, which "
                "the config.json ties to each other: if they differ, set tie_word_embeddings there "
                "to false"
            )
        name = present[0]
        file, shape, dtype = files.files[name], files.shapes[name], files.dtypes[name]
        if shape != tuple(parameter.shape) or dtype not in _FLOATS:
            raise ValueError(
                f"model.pretrained: {name} in {file} is {dtype} {list(shape)}, its config.json "
                f"asks for floating point {list(parameter.shape)}"
            )
