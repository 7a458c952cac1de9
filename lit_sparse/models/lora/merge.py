"""What a model with adapters is for others: one with plain weights, or adapters in peft's format.

Weights are named and read one by one, whoever holds them: a model, shards, files. Nothing here has
a whole model in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_sparse.models.export.write import write_tensors
from lit_sparse.models.lora.adapters import ADAPTER, adapted, base_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], Tensor | None]
"""Gives a tensor by its name; where ranks hold parts of it all of them call it, and it gives None
on those that do not write.
"""

MODEL_CONFIG = "model_config.json"
"""To be given to the base: `config=AutoConfig.from_pretrained("DIR/model_config.json")`. Not under
the name config.json, by which transformers takes a directory for a whole model.
"""

_README = f"""# Adapters trained by lit-sparse

Load them on their base model with the config beside them, which has the RoPE that they were trained
with. Without it the same adapters compute something else where training changed the RoPE.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("DIR/{MODEL_CONFIG}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, config=config), "DIR")
```
"""

_WRAPPED = ".base_layer."
"""peft moves the layer that it adapts one level down."""


@dataclass(frozen=True)
class Source:
    """Where a weight of the plain model is in the one with adapters: names in there."""

    weight: str
    a: str | None = None
    """Of A [rank, in], where it has an adapter."""
    b: str | None = None
    """Of B [out, rank]."""


def plain_name(name: str) -> str:
    """Name in the plain model of a weight of the one with adapters."""
    return name.replace(_WRAPPED, ".")


def sources(names: Iterable[str]) -> dict[str, Source]:
    """Name of each weight in the plain model -> where it is in the one with adapters.

    Args:
        names: of the weights of the latter.
    """
    held = dict.fromkeys(names)
    found = {}
    for name in held:
        layer = name.removesuffix(f"{_WRAPPED}weight")
        pair = [f"{layer}.lora_{matrix}.{ADAPTER}.weight" for matrix in "AB"]
        if layer != name and all(matrix in held for matrix in pair):
            found[plain_name(name)] = Source(name, *pair)
        elif not _is_adapter(name):
            found[plain_name(name)] = Source(name)
    return found


def _is_adapter(name: str) -> bool:
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name


def merged_weights(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    read: Read,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], Read]:
    """The weights of a model with its adapters merged in: W + alpha / rank B A, in float32.

    Args:
        model: with or without adapters.
        weights: by name, of their shapes and dtypes, on the meta device.
        read: gives them by name.
        dtype: of all weights of the merged model; None: that of the frozen ones.

    Returns:
        Both for the plain model; the same where there are no adapters.
    """
    state = adapted(model)
    if state is None:
        return dict(weights), read
    dtype = dtype or base_dtype(model)
    found, scale = sources(weights), state.lora.alpha / state.lora.rank

    def merge(name: str) -> Tensor | None:
        source = found[name]
        weight = read(source.weight)
        if source.a is None or source.b is None:
            return weight
        a, b = read(source.a), read(source.b)
        if weight is None or a is None or b is None:
            return None
        return weight.float() + scale * (b.float() @ a.float())

    shapes = {name: weights[source.weight].to(dtype) for name, source in found.items()}
    return shapes, merge


def write_adapter(
    model: PreTrainedModel,
    directory: Path,
    weights: Mapping[str, Tensor],
    read: Read,
    *,
    on_disk: Callable[[Callable[[], None]], None] = lambda action: action(),
) -> None:
    """Write the adapters alone as `peft.PeftModel.from_pretrained(base, directory)` loads them.

    Norms and embeddings that were trained are in there as modules_to_save. The model's config is
    put beside, as `MODEL_CONFIG`: its RoPE and its law, of which adapters know nothing.

    Args:
        model: with adapters.
        directory: where to; it appears whole or not at all, and replaces one that is there.
        weights: as for `merged_weights`.
        read: as well.
        on_disk: see `write_model`.
    """
    # peft wants the weight of a head that is tied to the embeddings under both names.
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    stored = {_peft_name(name): first[id(parameter)] for name, parameter in named.items()}
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.ensure_weight_tying = len(first) < len(named)
    modules = {n.split(".")[-2] for n in named if not _is_adapter(n)}
    config.modules_to_save = sorted(modules) or None
    config.target_modules = sorted(config.target_modules)  # a set has another order every time

    def read_copy(name: str) -> Tensor | None:
        tensor = read(stored[name])
        return None if tensor is None else tensor.clone()  # a file has no two names for one tensor

    def write_configs(unfinished: Path) -> None:
        config.save_pretrained(unfinished)
        about: Any = copy.deepcopy(model.config)
        about.dtype = str(base_dtype(model)).removeprefix("torch.")
        about.to_json_file(unfinished / MODEL_CONFIG)
        (unfinished / "README.md").write_text(_README, encoding="utf-8")

    write_tensors(
        directory,
        {name: weights[source] for name, source in stored.items()},
        read_copy,
        write_configs,
        stem="adapter_model",
        on_disk=on_disk,
        shard_size="1000TB",  # peft reads one file
    )


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


def check_adapter_replaceable(directory: Path) -> None:
    """ValueError if something is there that is no adapter, and would be lost."""
    if (directory / "adapter_config.json").is_file() or not directory.exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise ValueError(f"{directory} is there, and holds no adapter that could be replaced")
