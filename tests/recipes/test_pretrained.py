"""Fine-tuning a directory by the command line: from there to a model that plain transformers runs,
and what is wrong with a directory, a tokenizer or a checkpoint, in one line.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_sparse.cli import main
from lit_sparse.data.tokenizer import ByteTokenizer
from lit_sparse.models import build_model


@pytest.fixture
def config(tmp_path, architecture, corpus, monkeypatch):
    """A config of two steps with an architecture, and in `model` a directory that has it; in the
    working directory.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    build_model(architecture=architecture).save_pretrained("model")
    ByteTokenizer().save_pretrained("model")
    keys = {
        "model": {"architecture": architecture, "learning_rate": 1e-2, "warmup_steps": 0},
        "sparse_attention": {"budget": {"alpha": 1.0, "floor": 64}, "block": 16, "tile": 16},
        "curriculum": {"stages": [{"length": 256, "steps": 2}]},
        "data": {"path": str(corpus), "row_tokens": 512, "validation_rows": 1},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    Path("small.yaml").write_text(yaml.safe_dump(keys))
    return "small.yaml"


def _fit(config, *arguments):
    return main(["fit", "--config", config, "--model.pretrained", "model", *arguments])


def test_a_directory_is_tuned_exported_and_generates_in_plain_transformers(config, capsys):
    # The config's architecture is that of the directory, which brings the tokenizer too.
    assert _fit(config) == 0
    assert main(["export", "runs/small", "--out", "tuned"]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in ("model", "tuned"))
    assert after.config._attn_implementation == "sdpa"
    moved = (after.lm_head.weight - before.lm_head.weight).abs().max()
    assert 1e-3 < moved < 3e-2, "two steps from the weights of the directory"
    tokenizer = AutoTokenizer.from_pretrained("tuned")
    prompt = tokenizer("def value_1(x):\n", return_tensors="pt")
    written = after.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert written.shape[1] - prompt.input_ids.shape[1] in range(1, 9)
    assert tokenizer.decode(written[0]).startswith("def value_1(x):\n")


def _refused(message, config, capsys, *arguments):
    capsys.readouterr()
    assert _fit(config, *arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lit-sparse: error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("runs/small").exists()


def test_an_export_has_the_tokenizer_that_the_run_had(config, capsys):
    path = Path("model/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(tokenizer))
    assert _fit(config, "--trainer.max_steps", "1") == 0
    assert main(["export", "runs/small", "--out", "tuned"]) == 0
    wanted, found = (AutoTokenizer.from_pretrained(x)("a b").input_ids for x in ("model", "tuned"))
    assert wanted == found


def test_a_directory_of_another_architecture(config, capsys):
    keys = ["--model.architecture.num_hidden_layers", "3", "--model.architecture.head_dim", "16"]
    _refused(
        "model is a checkpoint of another architecture than model.architecture: num_hidden_layers "
        "2 instead of 3, head_dim 8 instead of 16; take the config of that model",
        *(config, capsys, *keys),
    )


def test_a_directory_without_weights_or_tokenizer(config, corpus, capsys):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        Path("model", file).unlink()
    _refused("model.pretrained model brings no tokenizer", config, capsys)
    Path("model/model.safetensors").unlink()
    _refused("model.pretrained: model has no model.safetensors", config, capsys)
    Path("model/config.json").unlink()
    _refused("model.pretrained: model has no config.json", config, capsys)


def test_weights_that_are_not_those_of_the_config(config, capsys):
    path = Path("model/config.json")
    keys = json.loads(path.read_text())
    layers = len(keys.pop("layer_types", [])) or keys["num_hidden_layers"]
    for changed, message in (
        (
            {"num_hidden_layers": layers + 1},
            "lack what its config.json asks for: model.",
        ),
        ({"intermediate_size": 8}, "is [32, 64], its config.json asks for [32, 8]"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "holds quantised weights (mxfp4)"),
    ):
        path.write_text(json.dumps({**keys, **changed}))
        _refused(message, config, capsys, "--model.architecture", "null")
    path.write_text(json.dumps(keys))
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:2000])
    _refused("model.pretrained: model cannot be loaded", config, capsys)


def test_a_store_of_another_tokenizer(config, corpus, capsys):
    assert main(["pack", str(corpus), "--tokenizer", "bytes", "--out", "store"]) == 0
    assert _fit(config, "--data.path", "store", "--trainer.max_steps", "1") == 0
    # The same bytes with other ids.
    path = Path("model/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(tokenizer))
    arguments = ["--run.name", "other", "--data.path", "store"]
    assert _fit(config, *arguments) == 2
    said = capsys.readouterr().err
    assert "store was made with another tokenizer (bytes) than that of model.pretrained" in said
    assert "id 97 is 'b' there and 'a' here" in said
    assert _fit(config, *arguments, "--data.tokenizer", "bytes", "--trainer.max_steps", "1") == 0


def test_a_vocabulary_that_is_too_small_is_found_before_weights_are_read(
    config, architecture, capsys
):
    small = {**architecture, "vocab_size": 200, "eos_token_id": None}
    build_model(architecture=small).save_pretrained("model")
    Path("model/model.safetensors").write_bytes(b"no weights")
    _refused("data.tokenizer has 257 tokens but the model embeds 200", config, capsys)


def test_a_checkpoint_of_another_model(config, capsys):
    assert main(["fit", "--config", config, "--run.name", "first"]) == 0
    checkpoint = "runs/first/checkpoints/step=2.ckpt"
    wide = ["--config", config, "--ckpt_path", checkpoint]
    wide += ["--model.architecture.intermediate_size", "96"]
    said = (
        f"ckpt_path: {checkpoint} is a checkpoint of another architecture than the config's: "
        "intermediate_size 64 instead of 96"
    )
    capsys.readouterr()
    for command in ("fit", "validate"):
        assert main([command, *wide, "--run.allow_changes", "true"]) == 2
        assert said in capsys.readouterr().err
    # One that somebody else wrote.
    state = torch.load(checkpoint, weights_only=True)
    del state["lit_sparse"], state["state_dict"]["model.model.norm.weight"]
    torch.save(state, "foreign.ckpt")
    assert main(["validate", "--config", config, "--ckpt_path", "foreign.ckpt"]) == 2
    assert (
        'foreign.ckpt does not hold this model: Missing key(s) in state_dict: "model.model.nor'
        in (capsys.readouterr().err)
    )


def test_code_that_a_directory_brings_is_not_run(config, capsys):
    path = Path("model/config.json")
    keys = json.loads(path.read_text())
    keys |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    path.write_text(json.dumps(keys))
    Path("model/odd.py").write_text("raise SystemExit('code of the model was run')")
    _refused("brings the Python code of its model", config, capsys)
