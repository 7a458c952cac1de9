"""Which models are refused, and by what name."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lit_sparse.budget import Budget
from lit_sparse.models import check_support, find_models, sparsify

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


def test_mistral_window(tiny):
    with pytest.raises(
        NotImplementedError, match=r"model\.layers\.0\.self_attn.*sliding_window=32.*for Mistral"
    ):
        sparsify(tiny("mistral", sliding_window=32), Budget())


@pytest.mark.parametrize("qwen", ["qwen2", "qwen3"])
def test_qwen_window(tiny, qwen):
    model = tiny(qwen, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    with pytest.raises(
        NotImplementedError,
        match=r"model\.layers\.1\.self_attn has sliding_attention \(config\.sliding_window=32\)",
    ):
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
        ("gemma2", AutoModelForCausalLM, r"model_type gemma2.*softcap 50\.0.*sliding_attention"),
        ("gpt2", AutoModelForCausalLM, "model_type gpt2 is not supported.*llama, mistral"),
        ("bert", AutoModel, "model_type bert"),
        ("t5", AutoModel, "model_type t5.*encoder-decoder"),
    ],
)
def test_other_models(kind, auto, named):
    with pytest.raises(ValueError, match=named):
        sparsify(build(kind, auto), Budget())


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
