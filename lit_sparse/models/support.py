"""Which models can be sparsified, and where their attention layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = (
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""Values of `config.model_type` whose attention layers are known and tested."""


def find_models(module: nn.Module) -> list[PreTrainedModel]:
    """The outermost transformers models in a module (LightningModule, PEFT wrapper), in order."""
    return list(named_models(module).values())


def named_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The same models by their attribute paths in the module, e.g. "model"; "" for itself."""
    from transformers import PreTrainedModel

    found: dict[str, PreTrainedModel] = {}

    def visit(path: str, current: nn.Module) -> None:
        if isinstance(current, PreTrainedModel):
            if not any(current is other for other in found.values()):
                found[path] = current
            return
        for name, child in current.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", module)
    return found


def attention_layers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """The attention modules of a supported model with their layer numbers, in order.

    Raises:
        ValueError: not a model whose layers are known.
    """
    require_known(model)
    decoder = cast(Any, model).base_model
    return [(layer.self_attn.layer_idx, layer.self_attn) for layer in decoder.layers]


def check_support(model: nn.Module) -> None:
    """Refuse a model that sparse attention would change in more than its budget.

    Raises:
        ValueError: the model is of another type, not causal, or has attention dropout.
        NotImplementedError: a layer has a sliding window; layer and feature are named.
    """
    require_known(model)
    config = cast(Any, model).config
    if not getattr(config, "is_causal", True):
        raise ValueError("config.is_causal is False: sparse attention is causal")
    dropout = getattr(config, "attention_dropout", None)
    layers = attention_layers(model)
    for _, module in layers:
        dropout = dropout or getattr(module, "attention_dropout", None)
    if dropout:
        raise ValueError(
            f"config.attention_dropout is {dropout}: sparse attention has no dropout; load the "
            "model with attention_dropout=0.0"
        )
    names = layer_names(model)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    # Mistral has one window for all layers and no types.
    everywhere = "full_attention" if window is None else "sliding_attention"
    for layer, _ in layers:
        kind = types[layer] if types else everywhere
        if kind != "full_attention":
            raise NotImplementedError(
                f"{names[layer]} has {kind} (config.sliding_window={window}): sparse attention "
                "replaces full attention only; load the model without the window "
                "(sliding_window=None for Mistral, use_sliding_window=False for Qwen) if it was "
                "trained on contexts longer than that"
            )


def layer_names(model: nn.Module) -> dict[int, str]:
    """Layer number -> name of its attention module, e.g. "model.layers.3.self_attn"."""
    names = {id(module): name for name, module in model.named_modules()}
    return {layer: names[id(module)] for layer, module in attention_layers(model)}


def require_known(model: nn.Module) -> None:
    """ValueError unless this is a transformers model of a supported type."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inside = ", ".join(type(found).__name__ for found in find_models(model))
        hint = f"; find_models(...) gives the {inside} inside it" if inside else ""
        raise ValueError(f"a transformers model is needed, got {type(model).__name__}{hint}")
    config = model.config
    kind = config.model_type
    if kind in SUPPORTED:
        return
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("an encoder-decoder")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        reasons.append(f"softcap {config.attn_logit_softcapping} on the scores")
    kinds = [
        other for other in getattr(config, "layer_types", None) or () if other != "full_attention"
    ]
    if kinds:
        reasons.append(f"layers with {kinds[0]}")
    what = f" ({', '.join(reasons)})" if reasons else ""
    raise ValueError(
        f"model_type {kind}{what} is not supported: sparse attention knows the causal language "
        f"models of type {', '.join(SUPPORTED)}"
    )
