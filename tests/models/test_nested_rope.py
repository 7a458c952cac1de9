"""Families whose RoPE is written otherwise: Gemma 3, Phi-3, gpt-oss, Mixtral."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_sparse.models import (
    RopeOrigin,
    architecture_keys,
    extend_context,
    other_architecture,
    rebuild_rope,
    restore_frequencies,
    rope_parameters,
    set_rope,
)
from lit_sparse.models.rope import frequencies

LENGTH = 2048
SLIDING = "sliding_attention"


@pytest.fixture
def gemma3(tiny):
    return tiny("gemma3_text")


def saved(model, directory):
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("rule", ["abf", "ntk", "linear", "yarn", "llama3"])
def test_rules_change_full_attention_only(gemma3, tokens, tmp_path, rule, caplog):
    near = frequencies(gemma3, SLIDING)[0].clone()
    far = frequencies(gemma3)[0].clone()
    sliding = dict(gemma3.config.rope_parameters[SLIDING])
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        extend_context(gemma3, [(512, {"rule": rule}), (LENGTH, {"rule": rule})])
        loaded = saved(gemma3, tmp_path)
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not [message for message in caplog.messages if "rope" in message.lower()]
    assert torch.equal(frequencies(gemma3, SLIDING)[0], near)
    assert gemma3.config.rope_parameters[SLIDING] == sliding
    assert not torch.equal(frequencies(gemma3)[0], far)
    assert rope_parameters(gemma3)["rope_theta"] >= 1e6
    assert gemma3.config.max_position_embeddings == LENGTH

    assert loaded.config.rope_parameters == gemma3.config.rope_parameters
    ids = tokens(1, 60)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, gemma3(ids).logits)
    # Back to the first stage.
    extend_context(gemma3, [(512, {"rule": rule})])
    assert torch.equal(frequencies(gemma3)[0], far)
    assert gemma3.config.max_position_embeddings == 512


def test_the_rest_of_nested_rope(gemma3, tiny):
    origin = RopeOrigin.of(gemma3)
    assert (origin.dimensions, origin.positions) == (16, 512)
    expected = frequencies(gemma3)[0].clone()
    rounded = tiny("gemma3_text").to(torch.bfloat16)
    restore_frequencies(rounded)
    with torch.device("meta"):
        empty = tiny("gemma3_text")
    rebuild_rope(empty, torch.device("cpu"))
    for other in (rounded, empty):
        assert torch.equal(frequencies(other)[0], expected)
        assert torch.equal(frequencies(other, SLIDING)[0], frequencies(gemma3, SLIDING)[0])
    config = gemma3.config.to_dict()
    for wrong in ({"rope_type": "linear"}, {"rope_type": "yarn", "factor": 4.0, "truncate": False}):
        with pytest.raises(ValueError, match="factor|truncate"):
            set_rope(gemma3, **wrong)
        assert gemma3.config.to_dict() == config


def test_gemma3_that_is_scaled_already(tiny):
    scaled = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
    near = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny("gemma3_text", rope_parameters={"full_attention": scaled, SLIDING: near})
    # Its config counts positions after scaling: 512 are 4 times 128.
    extend_context(model, [(LENGTH, {"rule": "linear"})])
    assert rope_parameters(model) == {**scaled, "factor": 16.0}
    assert model.config.max_position_embeddings == LENGTH


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("rule", ["abf", "ntk"])
def test_phi3(tiny, tmp_path, rule, partial):
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    model = tiny("phi3", rope_parameters=parameters)
    before = frequencies(model)[0].clone()
    assert before.numel() == 8 * partial
    extend_context(model, [(LENGTH, {"rule": rule})])
    assert frequencies(model)[0].shape == before.shape
    assert not torch.equal(frequencies(model)[0], before)
    assert torch.equal(frequencies(saved(model, tmp_path))[0], frequencies(model)[0])
    # transformers lets no other type into its config.
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=r"rope_type 'yarn': .*must be one of \['longrope'\]"):
        extend_context(model, [(LENGTH, {"rule": "yarn"})])
    assert model.config.to_dict() == config


def test_longrope(tiny, tokens, tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [float(i) for i in range(1, 9)]}
    model = tiny(
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )
    assert RopeOrigin.of(model).context == 512
    extend_context(model, [(256, None)])
    assert model.config.max_position_embeddings == 512
    with pytest.raises(ValueError, match="scales by max_position_embeddings"):
        extend_context(model, [(LENGTH, None)])
    with pytest.raises(ValueError, match="loaded with rope_type 'longrope'.*explicit parameters"):
        extend_context(model, [(LENGTH, {"rule": "yarn"})])
    extend_context(model, [(LENGTH, {"factor": 32.0})])
    assert model.config.max_position_embeddings == LENGTH
    # Phi-3 has the original context twice, and transformers reads that outside of rope_parameters.
    extend_context(model, [(LENGTH, {"factor": 32.0, "original_max_position_embeddings": 80})])
    loaded = saved(model, tmp_path)
    assert loaded.config.original_max_position_embeddings == 80
    assert rope_parameters(loaded) == rope_parameters(model)
    ids = tokens(1, 100)  # past the original context: the long factors
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_gpt_oss_goes_on_from_its_yarn(tiny, tmp_path):
    model = tiny("gpt_oss", max_position_embeddings=131072)
    loaded = rope_parameters(model)
    assert (loaded["rope_type"], loaded["factor"]) == ("yarn", 32)
    extend_context(model, [(262144, {"rule": "yarn"})])
    assert rope_parameters(model) == {**loaded, "factor": 64.0}
    assert model.config.max_position_embeddings == 262144
    assert torch.equal(frequencies(saved(model, tmp_path))[0], frequencies(model)[0])


def test_mixtral_leaves_the_size_of_a_head_open(tiny, tmp_path):
    """YaRN of transformers asks for it, in a loaded export too."""
    model = tiny("mixtral", num_local_experts=2)
    before = copy.deepcopy(model.config)
    assert before.head_dim is None
    extend_context(model, [(LENGTH, {"rule": "yarn"})])
    assert torch.equal(frequencies(saved(model, tmp_path))[0], frequencies(model)[0])
    # A run goes on from its checkpoint.
    assert other_architecture(model.config, before, architecture_keys(before)) is None
    before.head_dim = 32
    assert "head_dim" in other_architecture(model.config, before, architecture_keys(before))
