"""RoPE changed at run time is the RoPE of a model built so."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_sparse.budget import Budget
from lit_sparse.models import (
    restore_frequencies,
    rope_parameters,
    set_max_positions,
    set_rope,
    sparsify,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 2e4},
        YARN,
        LLAMA3,
    ],
    ids=lambda parameters: parameters.get("rope_type", "theta"),
)
def test_same_as_built_so(kind, tiny, tokens, parameters):
    ids = tokens(1, 100)
    model = tiny(kind)
    before = logits(model, ids)
    theta = rope_parameters(model)["rope_theta"]
    built = tiny(kind, rope_parameters={"rope_theta": theta, **parameters})
    set_rope(model, **parameters)
    assert torch.equal(logits(model, ids), logits(built, ids))
    assert not torch.equal(logits(model, ids), before)
    assert rope_parameters(model) == rope_parameters(built)
    set_rope(model, rope_type="default", rope_theta=theta)
    assert torch.equal(logits(model, ids), before)
    assert rope_parameters(model) == {"rope_type": "default", "rope_theta": theta}


def test_parameters_not_given_are_kept(tiny):
    model = tiny(rope_parameters={"rope_theta": 1e4, **YARN})
    set_rope(model, factor=2.0)
    assert rope_parameters(model) == {"rope_theta": 1e4, **YARN, "factor": 2.0}
    set_rope(model, rope_type="linear", factor=2.0)
    assert rope_parameters(model) == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def test_saved_and_loaded(tiny, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = sparsify(tiny(), Budget.dense())
    set_rope(model, **YARN)
    set_max_positions(model, 1024)
    model.save_pretrained(tmp_path)
    loaded = sparsify(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert rope_parameters(loaded) == rope_parameters(model)
    assert loaded.config.max_position_embeddings == 1024
    ids = tokens(1, 100)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_frequencies_stay_float32(tiny):
    model = tiny().to(torch.bfloat16)
    weights = set(model.state_dict())
    set_rope(model, rope_theta=5e5)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert rotary.config is model.config
    assert set(model.state_dict()) == weights


def test_frequencies_that_a_cast_has_rounded_are_restored(tiny):
    model, plain = tiny("llama"), tiny("llama")
    model.to(torch.bfloat16)
    rounded = model.model.rotary_emb.inv_freq
    assert rounded.dtype == torch.bfloat16
    restore_frequencies(model)
    frequencies = model.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, plain.model.rotary_emb.inv_freq)
    assert not torch.equal(frequencies, rounded.float())
    restore_frequencies(model)
    assert model.model.rotary_emb.inv_freq is frequencies


def test_max_positions(tiny, tokens):
    ids = tokens(1, 64)
    model = tiny(rope_parameters={"rope_theta": 1e4, **YARN})
    before = logits(model, ids)
    set_max_positions(model, 2048)
    assert model.config.max_position_embeddings == 2048
    assert torch.equal(logits(model, ids), before)


def test_original_positions_are_those_before_the_extension(tiny):
    model = tiny(max_position_embeddings=256)
    set_rope(model, rope_type="yarn", factor=4.0)
    set_max_positions(model, 1024)
    assert rope_parameters(model)["original_max_position_embeddings"] == 256


def test_a_config_that_leaves_head_dim_open(tiny, tokens, tmp_path):
    # As Mixtral's own does; transformers would multiply None.
    model = tiny("mixtral", num_local_experts=2)
    assert model.config.head_dim is None
    set_rope(model, rope_type="yarn", factor=4.0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(1, 30)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"theta": 1e6}, "has no parameter theta; it has rope_theta, rope_type"),
        ({"factor": 2.0}, "'default' has no parameter factor"),
        ({"rope_type": "yarm"}, "no rope_type 'yarm'.*yarn"),
        ({"rope_type": "linear"}, "'linear'.*factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be a number >= 1, got 0.5"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta must be a positive number, got '1e6'"),
        ({"rope_type": "llama3", "factor": 8.0}, "freq_factor"),
    ],
)
def test_refused_and_unchanged(tiny, tokens, parameters, message):
    model = tiny()
    ids = tokens(1, 30)
    before, config = logits(model, ids), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        set_rope(model, **parameters)
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config


def test_max_positions_refused(tiny):
    for n in (0, 1.5, True):
        with pytest.raises(ValueError, match="positive number of tokens"):
            set_max_positions(tiny(), n)
    model = tiny()
    set_rope(model, rope_type="dynamic", factor=2.0)
    with pytest.raises(ValueError, match="'dynamic' scales relative to max_position_embeddings"):
        set_max_positions(model, 4096)
    set_max_positions(model, model.config.max_position_embeddings)
