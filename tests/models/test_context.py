"""RoPE for longer contexts by rule: the formulas, and that nothing compounds."""

import copy
import logging
import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lit_sparse.models import extend_context, rope_parameters, set_max_positions, set_rope

THETA = 10000.0
# The context of `tiny` is 512 tokens, its heads have 16 dimensions.
LENGTH, FACTOR = 2048, 4.0
SCALED = {"factor": FACTOR, "original_max_position_embeddings": 512, "rope_theta": THETA}
BY_RULE = {
    "abf": {
        "rope_type": "default",
        "rope_theta": THETA ** (math.log(LENGTH / 2 / math.pi) / math.log(512 / 2 / math.pi)),
    },
    "ntk": {"rope_type": "default", "rope_theta": THETA * FACTOR ** (16 / 14)},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": FACTOR},
    "yarn": {"rope_type": "yarn", **SCALED},
    "llama3": {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def frequencies(model):
    rotary = model.base_model.rotary_emb
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("rule", BY_RULE)
def test_a_rule_gives_the_frequencies_of_transformers(kind, tiny, rule, caplog):
    model = tiny(kind, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        extend_context(model, [(512, {"rule": rule}), (LENGTH, {"rule": rule})])
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.messages
    expected = BY_RULE[rule]
    assert rope_parameters(model) == pytest.approx(expected)
    # vLLM multiplies the positions of "linear" only; see test_vllm.
    assert model.config.max_position_embeddings == (512 if rule == "linear" else LENGTH)
    ours, scaling = frequencies(model)
    if expected["rope_type"] == "default":
        theirs = expected["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(ours, theirs)
        assert scaling == 1
    else:
        config = copy.deepcopy(tiny(kind).config)
        config.max_position_embeddings, config.rope_parameters = LENGTH, dict(expected)
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[rule](config)
        assert torch.equal(ours, theirs)
        assert scaling == attention_factor


def test_what_the_rules_do_to_the_periods(tiny):
    def periods(*stages):
        model = tiny(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": THETA})
        extend_context(model, stages)
        return 2 * math.pi / frequencies(model)[0].double()

    before = periods((512, None))
    # The dimensions that turned once within the context turn once within the new one.
    for length in (1024, 8192):
        after = periods((length, {"rule": "abf"}))
        assert (after <= length).sum() == (before <= 512).sum()
    stretched = periods((LENGTH, {"rule": "ntk"})) / before
    assert stretched[[0, -1]].tolist() == pytest.approx([1, FACTOR])
    torch.testing.assert_close(periods((LENGTH, {"rule": "linear"})), before * FACTOR)
    raised = periods((LENGTH, {"rule": "abf", "theta": 5e5}))
    torch.testing.assert_close(raised, 2 * math.pi * 5e5 ** (torch.arange(0, 64, 2) / 64).double())


@pytest.mark.parametrize("rule", BY_RULE)
def test_stages_do_not_compound(tiny, rule):
    through, restored = tiny(), tiny()
    stages = [(length, {"rule": rule}) for length in (256, 512, 1024, 2048, 4096)]
    for i in range(len(stages)):
        extend_context(through, stages[: i + 1])
        if stages[i][0] <= 512:
            assert rope_parameters(through) == rope_parameters(restored)
    extend_context(restored, stages)
    assert rope_parameters(through) == rope_parameters(restored)
    assert torch.equal(frequencies(through)[0], frequencies(restored)[0])
    # And back again: the first stage of another run of the same model.
    extend_context(through, stages[:1])
    assert torch.equal(frequencies(through)[0], frequencies(tiny())[0])
    assert through.config.max_position_embeddings == 512


def test_stages_without_a_rule(tiny):
    model = tiny(rope_parameters={"rope_type": "default", "rope_theta": THETA})
    stages = [(1024, {"rule": "yarn"}), (1024, None), (2048, {"factor": 5.0})]
    extend_context(model, stages[:2])
    assert rope_parameters(model)["factor"] == 2
    extend_context(model, stages)
    assert rope_parameters(model) == {"rope_type": "yarn", **SCALED, "factor": 5.0}
    # What is not said is of the model as it was loaded, not of a stage before.
    extend_context(model, [(1024, {"rope_theta": 5e5}), (2048, {"rope_type": "yarn", "factor": 4})])
    assert rope_parameters(model) == {"rope_type": "yarn", **SCALED, "rope_theta": 5e5}


def test_original_says_what_the_config_does_not(tiny):
    model = tiny(max_position_embeddings=4096)
    rule = {"rule": "yarn", "original": 512, "beta_fast": 16.0}
    extend_context(model, [(LENGTH, rule)])
    assert rope_parameters(model) == {"rope_type": "yarn", **SCALED, "beta_fast": 16.0}
    assert model.config.max_position_embeddings == 4096


@pytest.mark.parametrize("rule", ["yarn", "llama3"])
@pytest.mark.parametrize("claimed", [512, 2048])  # configs claim either, or in between
def test_a_model_that_is_scaled_already_goes_on(tiny, rule, claimed):
    loaded = BY_RULE[rule]
    model = tiny(max_position_embeddings=claimed, rope_parameters=dict(loaded))
    extend_context(model, [(2048, {"rule": rule})])
    assert rope_parameters(model) == loaded
    extend_context(model, [(2048, {"rule": rule}), (8192, {"rule": rule})])
    assert rope_parameters(model) == {**loaded, "factor": 16.0}
    with pytest.raises(ValueError, match=f"loaded with rope_type '{rule}'.* use rule {rule}, or"):
        extend_context(model, [(8192, {"rule": "abf"})])


def test_a_scaled_model_that_does_not_say_enough(tiny):
    linear = tiny(rope_parameters={"rope_type": "linear", "rope_theta": THETA, "factor": 4.0})
    with pytest.raises(ValueError, match="does not say which context it was scaled from"):
        extend_context(linear, [(8192, {"rule": "linear"})])
    extend_context(linear, [(8192, {"rule": "linear", "original": 512})])
    assert rope_parameters(linear)["factor"] == 16
    yarn = tiny(rope_parameters={**BY_RULE["yarn"], "attention_factor": 1.2})
    with pytest.raises(ValueError, match="attention_factor 1.2 for its own factor 4.0: give"):
        extend_context(yarn, [(8192, {"rule": "yarn"})])
    extend_context(yarn, [(8192, {"rule": "yarn", "attention_factor": None})])
    assert frequencies(yarn)[1] == pytest.approx(0.1 * math.log(16) + 1)
    dynamic = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0})
    with pytest.raises(ValueError, match="loaded with rope_type 'dynamic'.* explicit parameters"):
        extend_context(dynamic, [(8192, {"rule": "linear"})])
    with pytest.raises(ValueError, match="'dynamic' scales by max_position_embeddings"):
        extend_context(dynamic, [(8192, None)])


def test_a_change_of_how_much_is_rotated_is_refused(tiny):
    # This Llama rotates whole heads whatever the config says; transformers' yarn obeys it.
    parameters = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}
    model = tiny(rope_parameters=parameters)
    with pytest.raises(ValueError, match="would rotate 8 dimensions of a head, .* rotates 16"):
        extend_context(model, [(LENGTH, {"rule": "yarn"})])
    extend_context(model, [(LENGTH, {"rule": "abf"})])
    assert frequencies(model)[0].shape == (8,)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rule": "alibi"}, "no rule 'alibi'; there are abf, ntk, linear, yarn, llama3"),
        ({"rule": "abf", "factor": 2}, "rule abf has no factor; it takes original, theta"),
        ({"rule": "abf", "theta": 0}, "theta must be a positive number, got 0"),
        ({"rule": "ntk", "original": 0.5}, "original must be a number of tokens >= 1"),
        ({"rule": "abf", "original": 4}, "no answer for a context of 4 tokens .* give theta"),
    ],
)
def test_refused_and_unchanged(tiny, rope, message):
    model = tiny()
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        extend_context(model, [(LENGTH, rope)])
    assert model.config.to_dict() == config


def test_the_origin_is_what_was_loaded(tiny):
    """Changes by hand before the first stage count, later ones do not."""
    model = tiny()
    set_rope(model, rope_theta=2e4)
    set_max_positions(model, 1024)
    for _ in range(2):
        extend_context(model, [(LENGTH, {"rule": "linear"})])
        wanted = {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}
        assert rope_parameters(model) == wanted
        set_rope(model, rope_theta=3e4)
