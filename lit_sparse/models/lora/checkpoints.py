"""Checkpoints of models with adapters: what they leave out, what they say, whom they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from lit_sparse.models.lora.adapters import LoRA, adapted, base_dtype
from lit_sparse.models.lora.base import Base
from lit_sparse.models.support import named_models


def left_out(module: nn.Module) -> set[str]:
    """Names, in the state dict of a module, of the weights that its checkpoints leave out: frozen
    ones of adapted models whose base is known.
    """
    found: set[str] = set()
    for path, model in named_models(module).items():
        state = adapted(model)
        if state is not None and state.base is not None:
            prefix = f"{path}." if path else ""
            names = model.named_parameters(remove_duplicate=False)
            found |= {prefix + name for name, weight in names if not weight.requires_grad}
    return found


def describe_adapters(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint says about the adapters of a module's models, in plain types: attribute
    path -> `lora`, `base` (None where the checkpoint has all weights) and its `dtype`.
    """
    return {
        path: {
            "lora": asdict(state.lora),
            "base": state.base and asdict(state.base),
            "dtype": str(base_dtype(model)).removeprefix("torch."),
        }
        for path, model in named_models(module).items()
        if (state := adapted(model)) is not None
    }


def check_adapters(checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse to load a checkpoint into a module with other adapters, or on another base.

    Args:
        checkpoint: what it says about itself, under "lit_sparse".
        module: its models are built.

    Raises:
        ValueError: says what differs, and what to set.
    """
    saved: dict[str, Any] = checkpoint.get("adapters") or {}
    here = {path: adapted(model) for path, model in named_models(module).items()}
    for path, state in here.items():
        if path not in saved:
            if state is not None:
                raise ValueError(
                    "model.lora is set, but the checkpoint is of a run without it: leave it out, "
                    "or start a new run from the weights (lit-sparse export, then "
                    "--model.pretrained)"
                )
            continue
        then = LoRA(**saved[path]["lora"])
        base = Base(**saved[path]["base"]) if saved[path]["base"] else None
        if state is None:
            where = f" on the weights of {base.directory}" if base else ""
            changed = [key for key in _KEYS if getattr(then, key) != getattr(LoRA(), key)]
            raise ValueError(
                f"model.lora is not set, but the checkpoint holds adapters{where}: set "
                f"{_listed(then, changed or ['rank'])} (lit-sparse export merges them into a model)"
            )
        # Dropout is no part of the weights.
        keys = [key for key in _KEYS if key != "dropout"]
        if differing := [key for key in keys if getattr(then, key) != getattr(state.lora, key)]:
            raise ValueError(
                f"the adapters of the checkpoint are others: it has {_listed(then, differing)}, "
                f"not {_listed(state.lora, differing)}"
            )
        if base and state.base and base.fingerprint != state.base.fingerprint:
            base.check("model.pretrained", state.base.directory)


_KEYS = tuple(field.name for field in fields(LoRA))


def _listed(lora: LoRA, keys: Sequence[str]) -> str:
    return ", ".join(f"model.lora.{key}: {json.dumps(getattr(lora, key))}" for key in keys)
