"""Which models can be sparsified, and where their attention layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "qwen3_moe",
    "mixtral",
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


def law_layers(model: nn.Module) -> list[int]:
    """Numbers of the layers that obey a law: those without a sliding window. Sorted."""
    return [layer for layer, _ in attention_layers(model) if window_of(model, layer) is None]


def window_of(model: nn.Module, layer: int) -> int | None:
    """How many of the nearest keys a layer of a supported model sees, its own included; None for a
    layer without such a window, or whose window is no shorter than the context that the model
    claims (Phi-3 for 128k).
    """
    window = _configured_window(model, layer)
    positions = cast(Any, model).config.max_position_embeddings
    return None if window is None or window >= positions else window


def idle_window(model: nn.Module) -> int | None:
    """The sliding window of layers that it does not limit, up to the context that the model claims:
    how far that may be extended. None: there is no such layer.
    """
    for layer, _ in attention_layers(model):
        window = _configured_window(model, layer)
        if window is not None and window_of(model, layer) is None:
            return window
    return None


def _configured_window(model: nn.Module, layer: int) -> int | None:
    config = cast(Any, model).config
    types = getattr(config, "layer_types", None)
    if types and types[layer] != "sliding_attention":
        return None
    # Mistral, Mixtral, Phi-3 and Qwen3-MoE have one window for all layers and no types.
    return getattr(config, "sliding_window", None)


def windows_everywhere(model: nn.Module) -> str:
    """What to tell of a model none of whose layers obeys a law."""
    return (
        f"every layer of this {type(model).__name__} has a sliding window "
        f"(config.sliding_window={window_of(model, 0)}), which it keeps: none obeys the law, and "
        "nothing can be sparser or measured. Load the model with sliding_window=None (null in its "
        "config.json) to let its layers see the whole context"
    )


def check_support(model: nn.Module) -> None:
    """Refuse a model that sparse attention would change in more than its budget.

    Raises:
        ValueError: the model is of another type, not causal, has attention dropout, or runs an
            attention function that somebody registered for it.
        NotImplementedError: a layer has neither full attention nor a sliding window; layer and kind
            are named.
    """
    require_known(model)
    config = cast(Any, model).config
    layers, names = attention_layers(model), layer_names(model)
    bidirectional = [names[layer] for layer, own in layers if not getattr(own, "is_causal", True)]
    if bidirectional or not getattr(config, "is_causal", True):
        where = f"{bidirectional[0]} sees later tokens" if bidirectional else "config.is_causal"
        raise ValueError(f"{where} (is_causal is False): sparse attention is causal")
    dropout = getattr(config, "attention_dropout", None)
    for _, module in layers:
        dropout = dropout or getattr(module, "attention_dropout", None)
    if dropout:
        raise ValueError(
            f"config.attention_dropout is {dropout}: sparse attention has no dropout; load the "
            "model with attention_dropout=0.0"
        )
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(
                f"{names[layer]} has {kind}: sparse attention replaces full attention, and keeps "
                "sliding windows"
            )
    _check_function(model)


def _check_function(model: nn.Module) -> None:
    from transformers import AttentionInterface

    name = cast(Any, model).config._attn_implementation or "eager"
    owner = getattr(AttentionInterface().get(name), "__module__", "transformers")
    # A name with a slash is a kernel that transformers downloads and registers itself.
    if "/" not in name and owner.partition(".")[0] not in ("transformers", "lit_sparse"):
        raise ValueError(
            f"config._attn_implementation is {name!r}, an attention function of {owner}: sparse "
            "attention would take its place; call model.set_attn_implementation('eager') first if "
            "it may"
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
    kind = model.config.model_type
    if kind in SUPPORTED:
        return
    reason = _reason(model)
    raise ValueError(
        f"model_type {kind}{f' ({reason})' if reason else ''} is not supported: sparse attention "
        f"knows the causal language models of type {', '.join(SUPPORTED)}"
    )


def _reason(model: PreTrainedModel) -> str:
    """What keeps a model of another type from being sparsified, where more than its name does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder with cross-attention"
    if getattr(config, "add_cross_attention", False):
        return "a decoder with cross-attention"
    text = config.get_text_config()
    if text is not config:
        own = ""
        if text.model_type in SUPPORTED:
            own = (
                f"; its language model is of the supported type {text.model_type}: save that as a "
                "model of its own, without the other inputs"
            )
        return f"a multimodal model, whose images and sounds are not causal{own}"
    classes = {type(module).__name__.lower() for module in model.modules()}
    if not any("attention" in name for name in classes):
        return "a state-space or recurrent model without attention"
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            stacks = (n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
            return f"{next(stacks, 'layer')}.{layer} has {kind}"
    decoder = getattr(config, "is_decoder", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
        return "an encoder, which is not causal"
    return ""
