"""build_model: a local directory or an architecture, and what is refused."""

import json

import pytest
import torch
from transformers import dynamic_module_utils

from lit_sparse.models import (
    architecture_of,
    build_model,
    check_source,
    model_config,
    pretrained_config,
)

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_architecture(kind):
    torch.manual_seed(0)
    model = build_model(architecture={"model_type": kind, **TINY, "rope_theta": 5e5})
    assert model.config.model_type == kind
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert model.dtype == torch.float32
    torch.manual_seed(0)
    again = build_model(architecture={"model_type": kind, **TINY, "rope_theta": 5e5})
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_saved_and_loaded(tmp_path):
    model = build_model(architecture={"model_type": "llama", **TINY}, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path))
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())
    assert build_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    # The config of a saved model is an architecture.
    assert build_model(architecture=loaded.config.to_diff_dict()).config.hidden_size == 64


def test_a_directory_counts_more_than_the_same_architecture(tmp_path):
    with pytest.raises(ValueError, match=r"set model\.pretrained or model\.architecture"):
        build_model()
    saved = build_model(architecture={"model_type": "llama", **TINY})
    saved.save_pretrained(tmp_path)
    changed = {"vocab_size": 50, "rope_theta": 5e5, "max_position_embeddings": 99}
    model = build_model(tmp_path, {"model_type": "llama", **TINY, **changed, "bos_token_id": 9})
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    for other, said in (
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 instead of 4; take"),
        ({"rms_norm_eps": 1e-5, "hidden_act": "gelu"}, "hidden_act silu instead of gelu, rms_norm"),
        ({"model_type": "qwen3"}, "model_type llama instead of qwen3; take"),
        (
            {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8},
            "num_hidden_layers 2 instead of 1 and 1 more; take",
        ),
    ):
        with pytest.raises(ValueError, match=f"of another architecture than .*{said}"):
            build_model(tmp_path, {"model_type": "llama", **TINY, **other})


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_code_of_a_directory_runs_where_it_is_trusted_only(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    directory = tmp_path / "odd"
    build_model(architecture={"model_type": "llama", **TINY}).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    code = {"AutoConfig": "odd_code.OddConfig", "AutoModelForCausalLM": "odd_code.OddForCausalLM"}
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    # transformers has a llama of its own, and needs no other.
    assert type(build_model(directory)).__module__.startswith("transformers.")
    (directory / "config.json").write_text(
        json.dumps({**config, "auto_map": code, "model_type": "odd"})
    )
    (directory / "odd_code.py").write_text(CODE)
    with pytest.raises(ValueError, match=r"not run: set model\.trust_remote_code: true if"):
        build_model(directory)
    assert type(build_model(directory, trust_remote_code=True)).__name__ == "OddForCausalLM"


def test_quantised_weights_are_refused(tmp_path):
    build_model(architecture={"model_type": "llama", **TINY}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.pretrained: .* quantised weights \(mxfp4\)"):
        check_source(tmp_path)


def test_directory_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pretrained: there is no directory.*meta-llama"):
        build_model("meta-llama/Llama-3.1-8B")
    with pytest.raises(ValueError, match=r"model\.pretrained: .* has no config\.json"):
        build_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.pretrained: .*config\.json cannot be read"):
        build_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    # Mistral's own format, which some directories bring besides.
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.pretrained: .* has no model\.safetensors"):
        build_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors, which"):
        build_model(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json is not an index of weights"):
        build_model(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hidden_size": 64}, "needs model_type"),
        ({"model_type": "lama"}, "no model_type 'lama'.*llama"),
        (
            {"model_type": "llama", "num_layers": 2, "hiden_size": 64},
            "LlamaConfig has no 'num_layers' .*, 'hiden_size' .*hidden_size",
        ),
        ({"model_type": "llama", "num_hidden_layer": 2}, "did you mean num_hidden_layers"),
        ({"model_type": "llama", "temperature": 1.0}, "has no 'temperature'"),
        (
            {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5},
            r"hidden size \(32\) is not a multiple",
        ),
        (
            {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 3},
            "num_key_value_heads = 3 does not divide num_attention_heads = 8",
        ),
    ],
)
def test_architecture_refused(architecture, message):
    with pytest.raises(ValueError, match=rf"model\.architecture.*{message}"):
        build_model(architecture=architecture)


def test_dtype_refused():
    for dtype in ("int8", "float33", "nn"):
        with pytest.raises(ValueError, match=rf"model\.dtype.*'{dtype}'"):
            build_model(architecture={"model_type": "llama", **TINY}, dtype=dtype)


def test_an_architecture_says_what_a_config_does(tiny, tmp_path):
    """Also where the file has keys that no field of the config class has."""
    tiny("gemma3_text").save_pretrained(tmp_path)
    config = pretrained_config(tmp_path)
    assert "_sliding_window_pattern" in config.to_diff_dict()
    again = model_config(None, architecture_of(config))
    differ = {k for k, v in config.to_dict().items() if again.to_dict().get(k) != v}
    assert differ <= {"architectures", "dtype", "_name_or_path", "transformers_version"}
