"""`model.architecture` as a config of transformers, and whether two configs are of one
architecture, so that weights of one fit the other.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from lit_sparse.models.state import CONFIG_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LISTED = 3

# Not fields of a config class, and yet read by every one that has RoPE.
_LEGACY = frozenset({"rope_theta", "rope_scaling", "head_dim"})

_FREE = frozenset(
    {
        # The context, which training extends.
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        # How weights begin, how text is made of ids, and how a call is made.
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "attention_dropout",
    }
)
"""Keys that differ between models whose weights mean the same."""


def architecture_keys(config: Any) -> list[str]:
    """The keys of a transformers config that say which weights there are and what they do."""
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field.name for field in dataclasses.fields(config) if field.init]
    return [key for key in own if key not in _FREE and key not in common]


def other_architecture(found: Any, wanted: Any, keys: Iterable[str]) -> str | None:
    """The first of these keys that two transformers configs do not agree about, in words; None
    where they agree.
    """
    pairs = {key: (_value(found, key), _value(wanted, key)) for key in keys}
    if found.model_type != wanted.model_type:
        pairs = {"model_type": (found.model_type, wanted.model_type)}
    differ = [f"{key} {a} instead of {b}" for key, (a, b) in pairs.items() if a != b]
    more = f" and {len(differ) - _LISTED} more" if len(differ) > _LISTED else ""
    return ", ".join(differ[:_LISTED]) + more if differ else None


def _value(config: Any, key: str) -> Any:
    value = getattr(config, key, None)
    if key == "head_dim" and value is None:  # Mixtral's may be left open, and RoPE's rules fill it
        return config.hidden_size // config.num_attention_heads
    return value


def architecture_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What `model.architecture` has to be for such a config: of what a file or a library adds to it
    (`_sliding_window_pattern` of Gemma 3) nothing.
    """
    known = {"model_type", *_known_keys(type(config))}
    return {key: value for key, value in config.to_diff_dict().items() if key in known}


def architecture_config(architecture: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config of `model.architecture`; ValueError for what it cannot be."""
    from transformers import CONFIG_MAPPING, AutoConfig

    keys = {key: value for key, value in architecture.items() if key != "model_type"}
    kind = architecture.get("model_type")
    if kind is None:
        raise ValueError("model.architecture needs model_type, e.g. 'llama'")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model.architecture: no model_type {kind!r}{_nearest(str(kind), list(CONFIG_MAPPING))}"
        )
    config_class = CONFIG_MAPPING[kind]
    known = _known_keys(config_class)
    # A config class stores any keyword as an attribute: a misspelt key would quietly do nothing.
    unknown = [key for key in keys if key not in known]
    if unknown:
        listed = ", ".join(f"{key!r}{_nearest(key, sorted(known))}" for key in unknown)
        raise ValueError(f"model.architecture: {config_class.__name__} has no {listed}")
    try:
        config = AutoConfig.for_model(kind, **keys)
    except StrictDataclassError as error:  # transformers' checks of its own
        raise ValueError(f"model.architecture: {error.__cause__ or error}") from error
    text = config.get_text_config()
    heads, shared = (
        getattr(text, f"num_{name}_heads", None) for name in ("attention", "key_value")
    )
    if heads and shared and heads % shared:
        raise ValueError(
            f"model.architecture: num_key_value_heads = {shared} does not divide "
            f"num_attention_heads = {heads}"
        )
    return config


def _known_keys(config_class: Any) -> set[str]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    return fields | set(config_class.attribute_map) | _LEGACY | {CONFIG_KEY}


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
