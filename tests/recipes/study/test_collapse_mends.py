"""What the study does to a model is what it says."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lit_sparse import Budget, sparsify
from lit_sparse.models import observe
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.study.collapse.mends import LengthScaling, scale_logits, with_qk_norm

TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 256,
}
IDS = torch.randint(257, (1, 96), generator=torch.Generator().manual_seed(0))


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, tie_word_embeddings=tied)
    return sparsify(LlamaForCausalLM(config).eval(), Budget.dense())


@torch.no_grad()
def logits(model, **call):
    """Attention logits of the first layer, without the causal mask: [heads, 96, 96]."""
    found = {}

    def observer(layer, q, k, v, out, lse, selection, options, documents):
        k = k.repeat_interleave(2, 1)
        found[layer] = options.scale * torch.einsum("ihd,jhd->hij", q, k)

    with observe(model, observer):
        model(IDS, use_cache=False, **call)
    return found[0]


def test_scaling_weights_scales_logits():
    model = llama()
    before = logits(model)
    scale_logits(model, 4.0)
    torch.testing.assert_close(logits(model), 4 * before)


def test_length_scaling_is_1_at_the_reference_and_follows_ln_n():
    model = llama()
    before = logits(model)
    scaling = LengthScaling(model, 32)
    n = torch.arange(1, 97)
    expected = (n.double().log() / math.log(32)).float()
    assert expected[31] == 1
    torch.testing.assert_close(logits(model), before * expected[:, None])
    # Documents of a packed row are counted by themselves.
    packed = torch.cat([torch.arange(48), torch.arange(48)])[None]
    found = scaling.factor(packed)[0]
    assert torch.equal(found[:48], found[48:])
    torch.testing.assert_close(found[:48].float(), expected[:48])
    scaling.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("factor", "tied"), [(1.0, False), (100.0, True)])
def test_qk_norm_keeps_the_weights_and_bounds_logits_whatever_their_size(factor, tied):
    model = llama(tied)
    scale_logits(model, factor)
    normed = with_qk_norm(model, 12.0).eval()
    assert normed.config.model_type == "qwen3"
    weights = normed.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
    found = logits(sparsify(normed, Budget.dense()))
    assert found.abs().max() <= 12.0001
    # Directions stay: only the lengths of queries and keys are set.
    plain = logits(model)
    assert torch.equal(found.sign(), plain.sign())
    one = logits(sparsify(with_qk_norm(llama(tied), 12.0).eval(), Budget.dense()))
    torch.testing.assert_close(found, one, atol=1e-3, rtol=1e-3)


def test_other_models_are_refused():
    with pytest.raises(BadArgument, match="Llama"):
        with_qk_norm(MistralForCausalLM(MistralConfig(**TINY)), 12.0)
