"""Hugging Face directories of trained models: weights in shards, configs, tokenizer, model card."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from lit_sparse.files import publish, remove, sync
from lit_sparse.models.export.card import CardFacts, Training, is_own_card, model_card
from lit_sparse.models.export.published import published
from lit_sparse.models.export.serving import context_of

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
    training: Training | None = None,
    on_disk: Callable[[Callable[[], None]], None] = lambda action: action(),
    shard_size: str = SHARD_SIZE,
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, in the names of
    `save_pretrained`.

    It appears whole or not at all; one that is there is replaced. Where several ranks hold the
    weights, all of them call this.

    Args:
        model: its config, which holds law and RoPE, and generation config are written.
        directory: where to.
        weights: name -> a tensor, on the meta device, of the shape and dtype to be stored.
        read: gives the values by name, on the CPU, on the rank that writes. Called with all names,
            one file of `shard_size` after the other, in the same order on all ranks. A tensor whose
            parts are stored apart may be read again for the next file.
        tokenizer: written besides; it gives a new model's generation config its special tokens.
        training: what the model card, README.md, says about it; None writes no card. A README.md of
            the user's own that is there stays, and the card is MODEL_CARD.md.
        on_disk: calls what it is given, on the rank that writes; raises on all ranks if that fails.
        shard_size: of a file, e.g. "5GB".
    """

    def write_others(unfinished: Path) -> None:
        config = _write_configs(model, unfinished, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
            _allow_context(unfinished / "tokenizer_config.json", context_of(config))
        _write_generation_config(model, unfinished)
        if training is not None:
            size = sum(tensor.numel() for tensor in weights.values())
            facts = CardFacts(config, type(model).__name__, size, config["dtype"], training)
            _write_card(unfinished, directory, model_card(facts))

    write_tensors(
        directory,
        *published(model, weights, read),
        write_others,
        stem="model",
        on_disk=on_disk,
        shard_size=shard_size,
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


def _write_configs(
    model: PreTrainedModel, directory: Path, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    return config.to_dict()


def _write_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """That of the pretrained model; where none came with it, the tokenizer's special tokens."""
    if not model.can_generate():
        return
    generation: Any = copy.deepcopy(model.generation_config)
    if generation._from_model_config and (directory / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(generation, name) is None:
                setattr(generation, name, getattr(tokenizer, name))
        # Else transformers takes it for one that the config says again.
        generation._from_model_config = False
    generation.save_pretrained(directory)


def _allow_context(tokenizer_config: Path, context: int) -> None:
    """Let a tokenizer that was made for a shorter context take whole ones: it would warn, and with
    `truncation=True` cut.
    """
    if not tokenizer_config.is_file():
        return
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    if settings.get("model_max_length", context) < context:
        settings["model_max_length"] = context
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        tokenizer_config.write_text(text, encoding="utf-8")


def _write_card(unfinished: Path, directory: Path, card: str) -> None:
    name, old = "README.md", directory / "README.md"
    if old.is_file() and not is_own_card(old):
        name = "MODEL_CARD.md"
        shutil.copy2(old, unfinished)
        warnings.warn(f"{old} is your own and stays; the model card is {name}", stacklevel=2)
    (unfinished / name).write_text(card, encoding="utf-8")


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
