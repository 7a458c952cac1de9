"""What an exported config says to transformers and vLLM about the context, and where they differ.

Read in vllm/config/model.py (`_get_and_verify_max_len`) and
vllm/model_executor/layers/rotary_embedding, version 0.24 and the change of vllm#56446 (September
2026). Nothing here imports vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lit_sparse.models.rope import FULL, is_nested

_BEFORE = "vLLM before vllm#56446 (September 2026)"


def full_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE parameters of the layers with full attention, of a config.json of transformers."""
    rope = config["rope_parameters"]
    return dict(rope[FULL] if is_nested(rope) else rope)


def multiplies_positions(model_type: str, rope_type: str) -> bool:
    """Whether vLLM takes max_position_embeddings times RoPE's factor for the context: where it is
    "linear", but for Gemma 3, whose configs count the positions after scaling.
    """
    return rope_type == "linear" and "gemma3" not in model_type


def context_of(config: Mapping[str, Any]) -> int:
    """The longest context in tokens that a config which lit-sparse wrote claims."""
    rope, positions = full_rope(config), int(config["max_position_embeddings"])
    if multiplies_positions(config["model_type"], rope["rope_type"]):
        return int(positions * rope["factor"])
    return positions


def serving_notes(config: Mapping[str, Any]) -> list[str]:
    """Sentences on what vLLM makes of a config.json, for a reader of the model card."""
    rope, context = full_rope(config), context_of(config)
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings", 0)
    if kind == "longrope":
        notes = [
            f"vLLM serves contexts of {original:,} tokens unless `--max-model-len {context}` says "
            "more; it then takes the long factors for every sequence, where transformers takes the "
            f"short ones in batches of up to {original:,} tokens.",
        ]
        ratio = config["max_position_embeddings"] / original
        theirs = _longrope_attention(original, ratio)
        ours = rope.get("attention_factor")
        if ours is None:
            ours = _longrope_attention(original, rope.get("factor") or ratio)
        if not math.isclose(ours, theirs):
            notes.append(f"vLLM's attention factor is {theirs:.4f}, not {ours:.4f}: other logits.")
        return notes
    if kind == "proportional":
        return ['vLLM has no rope_type "proportional".']
    notes = [f"vLLM derives a context of {context:,} tokens from the config."]
    if kind == "dynamic":
        longest = int(context * rope["factor"])
        notes = [
            f"vLLM derives a context of {longest:,} tokens, and computes the frequencies for that "
            "length whatever the sequence, where transformers follows the sequence: other logits."
        ]
    elif kind == "linear" and context != config["max_position_embeddings"]:
        notes.append(
            f"`max_position_embeddings` is the context before scaling, "
            f"{config['max_position_embeddings']:,}, because vLLM multiplies it by the factor; "
            "what reads it alone takes it for the whole context."
        )
    elif kind == "yarn" and "gemma3" not in config["model_type"]:
        if (product := int(original * rope["factor"])) != context:
            notes.append(f"{_BEFORE} derives {product:,} tokens, the original context * factor.")
        if ignored := [k for k in ("attention_factor", "mscale", "mscale_all_dim") if k in rope]:
            notes.append(f"{_BEFORE} ignores {', '.join(ignored)}: other logits.")
    return notes


def _longrope_attention(original: int, factor: float) -> float:
    """LongRoPE's attention factor (arXiv 2402.13753)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
