"""Whether configs of transformers are of one architecture: weights of one fit the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

_LISTED = 3

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
