"""sparsify and unsparsify as a user sees them: config, checkpoints, errors."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_sparse.budget import Budget
from lit_sparse.models import (
    Law,
    alpha_factor,
    attention_layers,
    budget_of,
    configured_law,
    dense_attention,
    is_sparse,
    law_of,
    observe,
    scale_budget,
    set_budget,
    set_dense,
    sparsify,
    unsparsify,
)

BUDGET = Budget.fixed(96, sink=16, local=0.25)


def test_checkpoint_remembers_the_law(kind, tiny, tokens, tmp_path):
    layers = {1: Budget.fixed(64, sink=16, ceiling=64)}
    model = sparsify(tiny(kind), BUDGET, layers=layers, block=16, tile=32, score="mean")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["sparse_attention"]
    assert stored["budget"]["alpha"] == 96
    assert list(stored["layers"]) == ["1"]

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert not is_sparse(loaded)
    ids = tokens(1, 200)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny(kind)(ids).logits)
        assert sparsify(loaded) is loaded
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert law_of(loaded) == Law(BUDGET, layers, block=16, tile=32, score="mean")


def test_unsparsify_restores_the_model(kind, tiny, tokens):
    model = tiny(kind)
    config, weights = model.config.to_dict(), set(model.state_dict())
    attributes = {layer: set(vars(module)) for layer, module in attention_layers(model)}
    ids = tokens(2, 150)
    with torch.no_grad():
        before = model(ids).logits
        sparsify(model, BUDGET, block=16)
        assert set(model.state_dict()) == weights
        assert not torch.equal(model(ids).logits, before)
        assert unsparsify(model) is model
        assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == config
    assert {layer: set(vars(module)) for layer, module in attention_layers(model)} == attributes
    assert not is_sparse(model)
    unsparsify(model)


def test_again_replaces_the_law(tiny, tokens):
    model = sparsify(tiny(), BUDGET, layers={0: Budget.dense()}, block=16)
    seen = []
    with observe(model, lambda *s: seen.append(s[6].density)):
        sparsify(model, Budget.dense(), block=32, tile=16)
        model(tokens(1, 200))
    assert seen == [1, 1]
    assert law_of(model) == Law(Budget.dense(), {}, block=32, tile=16)
    assert model.config.sparse_attention["layers"] == {}
    # Without a budget the law is the one in the config, here the same again.
    assert law_of(sparsify(model)) == Law(Budget.dense(), {}, block=32, tile=16)


def test_another_budget_for_a_while(tiny, tokens):
    ids, other, own = tokens(1, 300), Budget.fixed(32, sink=16), {1: Budget.fixed(64, sink=16)}
    model = sparsify(tiny(), BUDGET, layers=own, block=16, tile=16)
    with torch.no_grad():
        before = model(ids).logits
        set_budget(model, other)
        expected = sparsify(tiny(), other, layers=own, block=16, tile=16)(ids).logits
        assert not torch.equal(expected, before)
        assert torch.equal(model(ids).logits, expected)
        assert law_of(model) == Law(other, own, block=16, tile=16)
        assert law_of(model).to_dict() == model.config.sparse_attention
        set_dense(model, True)
        assert (law_of(model).budget, budget_of(model)) == (other, Budget.dense())
        set_dense(model, False)
        set_budget(model, None)
        assert budget_of(model) == BUDGET
        assert torch.equal(model(ids).logits, before)


def test_base_model(tiny, tokens):
    ids = tokens(1, 150)
    whole, base = tiny(), tiny().model
    sparsify(whole, BUDGET, block=16)
    sparsify(base, BUDGET, block=16)
    assert is_sparse(whole.model)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_attention_layers(kind, tiny):
    model = tiny(kind, num_hidden_layers=3, layer_types=None)
    layers = attention_layers(model)
    assert [layer for layer, _ in layers] == [0, 1, 2]
    assert all(module is model.model.layers[layer].self_attn for layer, module in layers)


def test_errors_name_what_to_do(tiny):
    model = tiny()
    with pytest.raises(ValueError, match=r"no sparse_attention.*pass a budget"):
        sparsify(model)
    with pytest.raises(ValueError, match=r"need a budget.*config\.sparse_attention"):
        sparsify(model, block=16)
    with pytest.raises(ValueError, match=r"\[2, 7\].*layers 0 to 1"):
        sparsify(model, BUDGET, layers={0: BUDGET, 7: BUDGET, 2: BUDGET})
    with pytest.raises(ValueError, match=r"layer numbers.*'1'"):
        sparsify(model, BUDGET, layers={"1": BUDGET})
    with pytest.raises(ValueError, match=r"layers\[1\] must be a Budget"):
        sparsify(model, BUDGET, layers={1: 5})
    with pytest.raises(ValueError, match="budget must be a Budget"):
        sparsify(model, 16)
    with pytest.raises(ValueError, match="block"):
        sparsify(model, BUDGET, block=48)
    with pytest.raises(ValueError, match="tile"):
        sparsify(model, BUDGET, tile=0)
    with pytest.raises(ValueError, match="score"):
        sparsify(model, BUDGET, score="mas")
    with pytest.raises(ValueError, match="score must be the name"):
        sparsify(model, BUDGET, score=lambda *_: None)
    assert not is_sparse(model)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "sparse_attention")


def test_unreadable_law(tiny):
    model = tiny(sparse_attention={"budget": {"alpha": 16.0, "gamma": 1}})
    with pytest.raises(ValueError, match=r"config\.sparse_attention.*gamma"):
        sparsify(model)
    model.config.sparse_attention = {"block": 64}
    with pytest.raises(ValueError, match=r"config\.sparse_attention.*budget"):
        sparsify(model)


def test_needs_a_sparse_model(tiny):
    model = tiny()
    for call in (law_of, lambda m: set_dense(m, True), lambda m: observe(m, print)):
        with pytest.raises(ValueError, match="LlamaForCausalLM is not sparse"):
            call(model)
    with pytest.raises(ValueError, match="is not sparse"), dense_attention(model):
        pass
    with pytest.raises(ValueError, match=r"\[5\].*layers 0 to 1"):
        observe(sparsify(model, BUDGET), print, layers=[0, 5])
    assert not is_sparse(nn.Linear(2, 2))


def test_unsparsify_goes_back_to_what_the_class_has(tiny, tokens):
    """Gemma 2 has no sdpa: its soft cap would be lost."""
    model, ids = tiny("gemma2", head_dim=16, sliding_window=8), tokens(1, 30)
    expected = model(ids, use_cache=False).logits
    assert model.config._attn_implementation == "eager"
    sparsify(model, BUDGET)
    assert unsparsify(model).config._attn_implementation == "eager"
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_name_without_a_law(tiny, tokens):
    """The registered name alone, as `attn_implementation=` sets it."""
    sparsify(tiny(), BUDGET)
    model = tiny()
    model.set_attn_implementation("lit_sparse")
    assert not is_sparse(model)
    with pytest.raises(ValueError, match=r"sparsify\(model, budget\)"):
        model(tokens(1, 8))


def test_features_that_appear_later(tiny, tokens):
    """What a config gains after sparsify is refused by the layer that meets it."""
    model = sparsify(tiny("mistral"), BUDGET)
    model.config.sliding_window = 8
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn has a sliding window of 8.*but had None"
    ):
        model(tokens(1, 20), use_cache=False)
    model.config.sliding_window = None
    model.train()
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match=r"layers\.1\.self_attn.*attention_dropout=0\.0"):
        model(tokens(1, 20))


def test_a_layer_that_is_not_causal(tiny):
    from lit_sparse.models.attention import sparse_attention_forward

    module = sparsify(tiny(), BUDGET).model.layers[1].self_attn
    q, kv = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    with pytest.raises(NotImplementedError, match=r"layers\.1\.self_attn.*is_causal=False"):
        sparse_attention_forward(module, q, kv, kv, None, is_causal=False)
    out, weights = sparse_attention_forward(module, q, kv, kv, None)
    assert out.shape == (1, 8, 4, 16)
    assert weights is None


def test_an_unknown_backend_fails_before_the_first_forward(tiny):
    with pytest.raises(
        ValueError, match=r"backend must be None or one of triton, cpu, reference, got 'gpu'"
    ):
        sparsify(tiny(), Budget.dense(), backend="gpu")


def test_alpha_is_scaled_whoever_sets_the_budget_and_in_any_order(tiny):
    model = tiny()
    given, stage = Budget(alpha=2, floor=16), Budget(alpha=8, exponent=0.25)
    sparsify(model, given, layers={1: Budget.dense(), 0: Budget(alpha=3)})
    scale_budget(model, 1.5)
    assert [budget_of(model).alpha, budget_of(model, 0).alpha] == [3, 4.5]
    assert budget_of(model, 1) == Budget.dense()
    set_budget(model, stage)
    assert budget_of(model) == Budget(alpha=12, exponent=0.25)
    scale_budget(model, 2)  # of what was given, not of what was
    assert budget_of(model) == Budget(alpha=16, exponent=0.25)
    own = {0: Budget(alpha=3), 1: Budget.dense()}
    assert configured_law(model) == Law(stage, own)
    assert alpha_factor(model) == 2
    assert law_of(model) == Law.from_dict(model.config.sparse_attention)
    set_budget(model, None)
    assert budget_of(model) == Budget(alpha=4, floor=16)
    scale_budget(model, 1)
    assert budget_of(model) == given
