"""Which models are refused, and by what name."""

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from lit_sparse.budget import Budget
from lit_sparse.models import (
    budget_of,
    check_support,
    find_models,
    is_sparse,
    law_layers,
    set_dense,
    sparsify,
    window_of,
)

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(kind, auto=AutoModelForCausalLM, **config):
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(kind, **{**SMALL, **config}))


def test_supported(kind, tiny):
    check_support(tiny(kind))
    check_support(tiny(kind).model)


def test_windows_in_all_layers(tiny, recwarn):
    model = sparsify(tiny("mistral", sliding_window=32), Budget())
    assert [window_of(model, layer) for layer in (0, 1)] == [32, 32]
    assert law_layers(model) == []
    (said,) = [str(w.message) for w in recwarn.list if "law" in str(w.message)]
    assert "MistralForCausalLM has a sliding window (config.sliding_window=32)" in said
    assert "Load the model with sliding_window=None" in said


@pytest.mark.parametrize("qwen", ["qwen2", "qwen3"])
def test_windows_in_some_layers(tiny, qwen, recwarn):
    """Laws are of the others; a law of a layer that has one is a mistake."""
    model = tiny(qwen, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    with pytest.raises(
        ValueError,
        match=r"layers names 1, but model\.layers\.1\.self_attn has a sliding window of 32 keys",
    ):
        sparsify(model, Budget(), layers={1: Budget.dense()})
    assert not is_sparse(model)
    sparsify(model, Budget(floor=8), layers={0: Budget.dense()})
    assert law_layers(model) == [0]
    assert budget_of(model, 0) == Budget.dense()
    set_dense(model, True)
    assert budget_of(model, 1)(torch.tensor([8, 4096])).tolist() == [8, 32]
    assert not recwarn.list


def test_layers_that_see_later_tokens(tiny):
    model = tiny(
        "gemma3_text", use_bidirectional_attention=True, layer_types=["full_attention"] * 2
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn sees later tokens"):
        sparsify(model, Budget())


def test_attention_dropout(kind, tiny):
    with pytest.raises(ValueError, match=r"config\.attention_dropout is 0\.1"):
        sparsify(tiny(kind, attention_dropout=0.1), Budget())
    # The layers took their own copy when they were built.
    model = tiny(kind, attention_dropout=0.1)
    model.config.attention_dropout = 0.0
    with pytest.raises(ValueError, match="attention_dropout"):
        sparsify(model, Budget())


def test_bidirectional_llama(tiny):
    model = tiny()
    model.config.is_causal = False
    with pytest.raises(ValueError, match="is_causal"):
        sparsify(model, Budget())


@pytest.mark.parametrize(
    ("kind", "auto", "named"),
    [
        ("gpt2", AutoModelForCausalLM, "model_type gpt2 is not supported.*llama, mistral"),
        ("bert", AutoModel, r"model_type bert \(an encoder, which is not causal\)"),
        ("t5", AutoModel, "model_type t5.*an encoder-decoder with cross-attention"),
        ("bart", AutoModel, "model_type bart.*an encoder-decoder with cross-attention"),
        ("mamba", AutoModelForCausalLM, "model_type mamba.*without attention"),
    ],
)
def test_other_models(kind, auto, named):
    with pytest.raises(ValueError, match=named):
        sparsify(build(kind, auto), Budget())


@pytest.mark.parametrize(
    ("kind", "layer_types", "named"),
    [
        (
            "llama4_text",
            ["full_attention", "chunked_attention"],
            r"layers\.1 has chunked_attention",
        ),
        ("qwen3_next", ["linear_attention", "full_attention"], r"layers\.0 has linear_attention"),
    ],
)
def test_layers_of_other_kinds_are_named(kind, layer_types, named):
    experts = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ValueError, match=named):
        sparsify(build(kind, layer_types=layer_types, **experts), Budget())


def test_a_layer_of_another_kind_in_a_supported_model(tiny):
    model = tiny()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(
        NotImplementedError, match=r"model\.layers\.1\.self_attn has chunked_attention"
    ):
        sparsify(model, Budget())


def test_multimodal_models_are_told_which_part_to_take():
    text = {**SMALL, "model_type": "gemma3_text", "head_dim": 16, "num_key_value_heads": 2}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(
        ValueError, match="model_type gemma3.*multimodal.*supported type gemma3_text"
    ):
        sparsify(model, Budget())


def test_somebody_elses_attention_is_not_replaced(tiny, tokens):
    """A function that was registered for the model, under its own name or under one of theirs."""

    def theirs(*args, **kwargs):
        raise AssertionError

    before = AttentionInterface._global_mapping["sdpa"]
    AttentionInterface.register("theirs", theirs)
    model = tiny()
    try:
        AttentionInterface.register("sdpa", theirs)
        with pytest.raises(ValueError, match="_attn_implementation is 'sdpa'.*of .*test_support"):
            sparsify(model, Budget())
        AttentionInterface.register("sdpa", before)
        model.set_attn_implementation("theirs")
        with pytest.raises(ValueError, match="_attn_implementation is 'theirs'.*'eager'"):
            sparsify(model, Budget())
        assert model.config._attn_implementation == "theirs"
        model.set_attn_implementation("eager")
        sparsify(sparsify(model, Budget()), Budget())(tokens(1, 8))
    finally:
        AttentionInterface.register("sdpa", before)
        del AttentionInterface._global_mapping["theirs"]


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 20, 20), {"full_attention": None}])
def test_masks_of_ones_own_are_refused(tiny, tokens, mask):
    model = tiny("gemma2", head_dim=16, sliding_window=8)
    sparsify(model, Budget())
    if isinstance(mask, dict):
        mask = dict.fromkeys(("full_attention", "sliding_attention"), torch.zeros(1, 1, 20, 20))
    with pytest.raises(ValueError, match=r"4D attention mask \[1, 1, 20, 20\] is refused"):
        model(tokens(1, 20), attention_mask=mask)


class Wrapper(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def test_find_models(tiny):
    first, second = tiny(), tiny("qwen3")
    module = Wrapper(head=nn.Linear(2, 2), model=Wrapper(inner=first), teacher=second, alias=first)
    assert find_models(module) == [first, second]
    assert find_models(first) == [first]
    assert find_models(nn.Linear(2, 2)) == []


def test_wrapped_model_is_pointed_out(tiny):
    with pytest.raises(ValueError, match=r"got Wrapper; find_models.*LlamaForCausalLM"):
        sparsify(Wrapper(model=tiny()), Budget())
    with pytest.raises(ValueError, match=r"got Linear$"):
        sparsify(nn.Linear(2, 2), Budget())
