"""Build the model of a run: from a local directory, or from an architecture with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lit_sparse.models.architecture import (
    architecture_config,
    architecture_keys,
    other_architecture,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


def build_model(
    pretrained: str | Path | None = None,
    architecture: Mapping[str, Any] | None = None,
    *,
    dtype: str | torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build a causal language model: from a directory if one is given, else a new one.

    Args:
        pretrained: a local directory as `save_pretrained` writes it: config.json and *.safetensors.
            Nothing is downloaded.
        architecture: `model_type` and keys of its transformers config; weights are random, from
            torch's global generator. Beside a directory it says what is expected there.
        dtype: of the weights.
        trust_remote_code: run Python code that the directory brings, with all rights of this
            process.

    Raises:
        ValueError: neither source, a directory without what is needed, of another architecture or
            with code that is not trusted, or unknown keys; the message names `model.pretrained` or
            `model.architecture`.
    """
    check_source(pretrained, architecture, trust_remote_code)
    weights = _dtype(dtype)
    if pretrained is not None:
        return _load(pretrained, weights, trust_remote_code)
    assert architecture is not None
    return _from_architecture(architecture, weights)


def check_source(
    pretrained: str | Path | None = None,
    architecture: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raise what `build_model` would about its sources, before any weight is made or read."""
    model_config(pretrained, architecture, trust_remote_code)
    if pretrained is not None:
        weight_files(pretrained)


def model_config(
    pretrained: str | Path | None = None,
    architecture: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The transformers config of what `build_model` builds, which raises the same ValueErrors but
    for weights that are missing.

    A directory counts more than an architecture, if it has that architecture: the same model_type,
    and the same values of all keys that the architecture names, but for the size of the vocabulary,
    RoPE, positions and the ids of special tokens, which fine-tuning changes.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    expected = None if architecture is None else architecture_config(architecture)
    if pretrained is None:
        if expected is None:
            raise ValueError("set model.pretrained or model.architecture")
        return expected
    config = pretrained_config(pretrained, trust_remote_code)
    if not trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model.pretrained: {pretrained} is of model_type {config.model_type}, of which "
            "transformers has no causal language model"
        )
    if architecture is not None and expected is not None:
        named = [key for key in architecture_keys(expected) if key in architecture]
        keys = [key for key in named if key != "vocab_size"]
        if differing := other_architecture(config, expected, keys):
            raise ValueError(
                f"model.pretrained: {pretrained} is a checkpoint of another architecture than "
                f"model.architecture: {differing}; take the config of that model, or set "
                "--model.architecture null"
            )
    return config


def pretrained_config(directory: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers config of a local directory; ValueError where there is none, or one whose
    class the directory brings itself and is not trusted.
    """
    from transformers import AutoConfig

    path = Path(directory)
    if not path.is_dir():
        raise ValueError(
            f"model.pretrained: there is no directory {path} (models are not downloaded; fetch it "
            "first)"
        )
    if not (path / "config.json").is_file():
        _refuse_adapter(path)
        raise ValueError(f"model.pretrained: {path} has no config.json")
    if not trust_remote_code and _needs_own_code(path):
        raise ValueError(
            f"model.pretrained: {path} brings the Python code of its model (auto_map in its "
            "config.json), which is not run: set model.trust_remote_code: true if you have read it "
            "or trust where it is from"
        )
    try:
        config = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, StrictDataclassError) as error:
        raise ValueError(
            f"model.pretrained: {path / 'config.json'} cannot be read: {error.__cause__ or error}"
        ) from error
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"model.pretrained: {path} holds quantised weights ({method}), which no optimizer can "
            "change and no export can write: save plain ones first (of gpt-oss: "
            "AutoModelForCausalLM.from_pretrained(DIR, quantization_config=Mxfp4Config("
            "dequantize=True)).save_pretrained(NEW))"
        )
    return config


def _needs_own_code(directory: Path) -> bool:
    """Whether a directory says that its model is one of its own code, and transformers has none."""
    from transformers import CONFIG_MAPPING

    try:
        given = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return bool(given.get("auto_map")) and given.get("model_type") not in CONFIG_MAPPING
    except (ValueError, AttributeError):  # transformers says what is wrong with it
        return False


def pretrained_generation(directory: str | Path) -> GenerationConfig | None:
    """How a local directory says that its model generates, or None where it says nothing."""
    from transformers import GenerationConfig

    if not (Path(directory) / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(directory, local_files_only=True)


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that transformers loads from a directory: one, or those of its index.

    Raises:
        ValueError: there is neither, or a file of the index is missing.
    """
    path = Path(directory)
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        _refuse_adapter(path)
        raise ValueError(
            f"model.pretrained: {path} has no model.safetensors, nor an index of such files "
            "(pickled weights are not loaded: they may run code; convert them with "
            "save_pretrained)"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"model.pretrained: {index} is not an index of weights") from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"model.pretrained: {path} lacks {', '.join(missing)}, which {index.name} names"
        )
    return [path / name for name in names]


def _refuse_adapter(directory: Path) -> None:
    """ValueError where a directory without a model has an adapter of peft's."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ValueError(
        f"model.pretrained: {directory} holds adapters alone, for the model {base}, and no model: "
        "merge them first, with lit-sparse export (of the checkpoint) or peft's merge_and_unload, "
        f"or start from {base} with model.lora"
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"model.dtype must be a floating point type such as 'bfloat16', got {dtype!r}"
        )
    return found


def _load(directory: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        # Lightning's configure_model may run inside of the context of a device; transformers would
        # then ask for accelerate. Strategies move the model.
        with torch.device("cpu"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
                output_loading_info=True,
            )
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise ValueError(f"model.pretrained: {directory} cannot be loaded: {error}") from error
    model, report = loaded
    # transformers draws at random what it does not find.
    if report["mismatched_keys"]:
        name, found, asked = min(report["mismatched_keys"])
        raise ValueError(
            f"model.pretrained: {name} in {directory} is {list(found)}, its config.json asks for "
            f"{list(asked)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"model.pretrained: the files of {directory} lack what its "
            f"config.json asks for: {missing[0]} and {len(missing) - 1} more"
        )
    return model


def model_without_weights(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model on the meta device: all of it but memory.

    Raises:
        ValueError: its config asks for what is not installed.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except ImportError as error:  # of an attn_implementation
        where = config.name_or_path or config.model_type
        raise ValueError(f"model.pretrained: {where} cannot be built: {error}") from error


def _from_architecture(architecture: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(architecture_config(architecture), dtype=dtype)
