"""How vLLM reads an exported config: the context that it derives, and the frequencies."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_sparse.models import extend_context
from lit_sparse.models.rope import frequencies

LENGTH = 2048
THETA = 10000.0
DEFAULT = {"rope_type": "default", "rope_theta": THETA}


def longest(config, yarn_by_factor):
    """The context that vLLM derives from a config.json (`_get_and_verify_max_len` in
    vllm/config/model.py, read at version 0.24 and at vllm#56446, which changed it for YaRN).
    """
    reach = config["max_position_embeddings"]
    rope = config["rope_parameters"]
    if "gemma3" in config["model_type"]:
        return reach
    kind = rope["rope_type"]
    if kind == "longrope":
        return config.get("original_max_position_embeddings", reach)
    if kind == "llama3":
        return reach
    if kind == "yarn":
        if not yarn_by_factor:
            return reach
        reach = rope["original_max_position_embeddings"]
    return int(reach * rope.get("factor", 1.0))


def inverse_frequencies(config, dim=16):
    """Those of vllm/model_executor/layers/rotary_embedding, and its factor on cos and sin."""
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / factor), 1.0
    if kind == "yarn":

        def dimension(turns):
            context = rope["original_max_position_embeddings"]
            return (
                dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))
            )

        low = max(math.floor(dimension(rope.get("beta_fast", 32))), 0)
        high = min(math.ceil(dimension(rope.get("beta_slow", 1))), dim - 1)
        scaled = ((torch.arange(dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return plain * (1 - scaled + scaled / factor), 0.1 * math.log(factor) + 1
    return plain, 1.0


def exported(model, directory):
    model.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def check(model, directory, length):
    config = exported(model, directory)
    assert [longest(config, by_factor) for by_factor in (True, False)] == [length, length]
    ours, factor = frequencies(model)
    theirs, scaling = inverse_frequencies(config)
    torch.testing.assert_close(ours, theirs)
    assert factor == pytest.approx(scaling)
    loaded = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rule", ["abf", "ntk", "linear", "yarn", "llama3"])
def test_every_rule(tiny, tmp_path, kind, rule):
    model = tiny(kind, **({"rope_parameters": DEFAULT} if kind == "llama" else {}))
    extend_context(model, [(512, {"rule": rule}), (LENGTH, {"rule": rule})])
    check(model, tmp_path, LENGTH)


@pytest.mark.parametrize("length", [1000, 1536, 3000, 12345])
@pytest.mark.parametrize("rule", ["linear", "yarn"])
def test_lengths_that_are_no_multiple(tiny, tmp_path, rule, length):
    model = tiny(rope_parameters=DEFAULT)
    extend_context(model, [(length, {"rule": rule})])
    check(model, tmp_path, length)


@pytest.mark.parametrize(
    ("length", "rope"), [(2048, None), (2048, {"rule": "yarn"}), (8192, {"rule": "yarn"})]
)
@pytest.mark.parametrize("claimed", [512, 2048])
def test_yarn_from_the_start(tiny, tmp_path, claimed, length, rope):
    """Qwen's configs claim the context before scaling, gpt-oss's that after."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    model = tiny(max_position_embeddings=claimed, rope_parameters={**yarn, "rope_theta": THETA})
    extend_context(model, [(length, rope)])
    check(model, tmp_path, length)


def test_others_from_the_start(tiny, tmp_path):
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": THETA}
    scaled = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    model = tiny(max_position_embeddings=1024, rope_parameters={**scaled, **llama3})
    extend_context(model, [(8192, {"rule": "llama3"})])
    check(model, tmp_path / "llama3", 8192)
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": THETA}
    model = tiny(rope_parameters=linear)
    for length in (2048, 8192):
        extend_context(model, [(length, {"rule": "linear", "original": 512})])
        check(model, tmp_path / str(length), length)
    # What a run leaves as it was loaded is claimed as it was.
    model = tiny(rope_parameters=linear)
    extend_context(model, [(256, None)])
    assert model.config.max_position_embeddings == 512


def test_longrope_is_served_at_its_original_context(tiny, tmp_path):
    """Unless --max-model-len says more, which the model card tells."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny(
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": THETA, **factors},
    )
    extend_context(model, [(256, None)])
    assert longest(exported(model, tmp_path), True) == 64
