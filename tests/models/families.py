"""The supported families as tiny random models of their real classes, and the README's table of
what was tested of them.

`python tests/models/families.py` prints the table. Every cell is read from the models that
test_families.py runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.models import attention_layers, window_of

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # The default scale gives logits so flat that wrong attention would pass.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
WINDOW = 24
SOME = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A model_type, the names that its models go by, and configs that show what they use."""

    kind: str
    names: str
    variants: tuple[dict[str, Any], ...] = ({},)


FAMILIES = (
    Family(
        "llama",
        "Llama 2 and 3",
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
            {"num_key_value_heads": 4},
        ),
    ),
    Family("mistral", "Mistral", ({"sliding_window": None}, {"sliding_window": WINDOW})),
    Family("qwen2", "Qwen2, Qwen2.5", ({}, SOME)),
    Family("qwen3", "Qwen3", ({"head_dim": 16}, {"head_dim": 16, **SOME})),
    Family(
        "gemma2",
        "Gemma 2",
        (
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 8,
                "sliding_window": WINDOW,
                "attn_logit_softcapping": 10.0,
            },
        ),
    ),
    Family(
        "gemma3_text",
        "Gemma 3, text models",
        (
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
    ),
    Family(
        "phi3",
        "Phi-3, Phi-4",
        (
            {"sliding_window": WINDOW, "num_key_value_heads": 4},
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
        ),
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        (
            {
                **EXPERTS,
                "head_dim": 16,
                "num_key_value_heads": 1,
                "sliding_window": WINDOW,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
        ),
    ),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        (
            {
                "head_dim": 16,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
        ),
    ),
    Family("mixtral", "Mixtral", ({**EXPERTS, "sliding_window": None},)),
)
VARIANTS = [(family.kind, variant) for family in FAMILIES for variant in family.variants]
NAMES = [f"{f.kind}-{i}" for f in FAMILIES for i in range(len(f.variants))]


def build(kind: str, seed: int = 0, **config: Any) -> Any:
    """A random model of 2 layers whose attention is sharp: 4 query heads of dimension 16."""
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(kind, **{**TINY, **config})
    model = AutoModelForCausalLM.from_config(settings).eval()
    for _, module in attention_layers(model):
        if hasattr(module, "q_norm"):
            # Normalised queries and keys give flat logits.
            torch.nn.init.constant_(module.q_norm.weight, 3.0)
        if hasattr(module, "sinks"):
            torch.nn.init.uniform_(module.sinks, -1.0, 4.0)
    return model


def features(model: Any) -> dict[str, str]:
    """What attention of a model has, read from its modules."""
    layers = attention_layers(model)
    windows = [window_of(model, layer) is not None for layer, _ in layers]
    attention: Any = layers[0][1]
    decoder = model.base_model
    rope = model.config.rope_parameters
    nested = "rope_type" not in rope
    types = {own["rope_type"] for own in (rope.values() if nested else [rope])}
    note = " (one for each kind of layer)" * nested
    if not nested and rope.get("partial_rotary_factor", 1.0) < 1:
        note = " (of part of the head)"
    return {
        "query heads a key-value head": str(attention.num_key_value_groups),
        "QK-norm": "yes" if hasattr(attention, "q_norm") else "",
        "sliding window": "all layers" if all(windows) else "some layers" if any(windows) else "",
        "soft cap": "yes" if attention_options(model)["softcap"] else "",
        "sinks": "yes" if attention_options(model)["sinks"] else "",
        "RoPE": ", ".join(sorted(types)) + note,
        "experts": "yes" if hasattr(decoder.layers[0].mlp, "experts") else "",
        "same as": "eager and sdpa" if model._supports_sdpa else "eager",
    }


def attention_options(model: Any) -> dict[str, bool]:
    """Soft cap and sinks as the model hands them over with each call."""
    from lit_sparse import Budget
    from lit_sparse.models import observe, sparsify, unsparsify

    seen: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no layer obeys the law
        sparsify(model, Budget.dense())
    with observe(model, lambda *call: seen.append(call[7])):
        model(torch.ones(1, 2, dtype=torch.long), use_cache=False)
    unsparsify(model)
    return {
        "softcap": all(own.softcap is not None for own in seen),
        "sinks": all(own.sinks is not None for own in seen),
    }


def table() -> str:
    """The README's table, in Markdown: of each family what its tested variants have."""
    rows = []
    for family in FAMILIES:
        found = [features(build(family.kind, **variant)) for variant in family.variants]
        cells = {key: _cell(own[key] for own in found) for key in found[0]}
        if not rows:
            rows = [["`model_type`", "models", *cells]]
            rows.append(["---"] * len(rows[0]))
        rows.append([f"`{family.kind}`", family.names, *cells.values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(values: Iterable[str]) -> str:
    """What variants have, each once; "none" where some have nothing and others do."""
    distinct = sorted(set(values))
    if distinct == [""]:
        return "-"
    return " or ".join(value or "none" for value in distinct)


if __name__ == "__main__":
    print(table())
