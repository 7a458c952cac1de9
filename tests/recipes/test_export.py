"""lit-sparse export on the directory of a run, and what it refuses in one line."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_sparse.cli import main
from lit_sparse.models import build_model, law_of, sparsify


@pytest.fixture
def config(tmp_path, architecture, corpus, monkeypatch):
    """small.yaml, of a run of two steps, each with a checkpoint, in the working directory."""
    monkeypatch.chdir(tmp_path)
    keys = {
        "model": {"architecture": {**architecture, "tie_word_embeddings": True}},
        "sparse_attention": {"budget": {"alpha": 1.0, "floor": 32}, "block": 16, "tile": 16},
        "curriculum": {"stages": [{"length": 128, "steps": 2}]},
        "checkpoint": {"every_n_steps": 1},
        "data": {"path": str(corpus), "row_tokens": 256, "validation_rows": 1},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lit_sparse.callbacks.HuggingFaceExport"}],
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(keys))
    return keys


@pytest.fixture
def run(config, tmp_path):
    """The directory of the run."""
    assert main(["fit", "--config", "small.yaml"]) == 0
    return tmp_path / "runs" / "small"


def _export(*arguments, error=None, capsys=None):
    status = main(["export", *map(str, arguments)])
    if error is None:
        assert status == 0
        return
    said = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(said) == 1
    assert said[0].startswith("lit-sparse: error: ")
    assert error in said[0]


def test_a_run_becomes_what_it_left_itself(run, tmp_path, capsys):
    _export(run, "--out", "model")
    assert "model: LlamaForCausalLM after 2 steps" in capsys.readouterr().out
    left = run / "huggingface"
    names = {path.name for path in left.iterdir()}
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (left / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained("model")("def é").input_ids == list("def é".encode())

    card = (tmp_path / "model" / "README.md").read_text()
    assert "| 1 | 128 | 2 | as before | sparse |" in card
    assert "| floor | 32 |" in card
    assert "| `gap/kl` | KL divergence of the logits from its own dense forward" in card
    assert "| not measured |" in card
    assert str(tmp_path) not in card

    # A checkpoint, in another dtype.
    first = run / "checkpoints" / "step=1.ckpt"
    _export(first, "--out", "first", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained("first")
    weights = torch.load(first, weights_only=True)["state_dict"]
    assert torch.equal(model.lm_head.weight, weights["model.lm_head.weight"].bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert law_of(sparsify(model)).budget.floor == 32
    assert "| 1 | 128 | 1 of 2 | as before | sparse |" in (tmp_path / "first/README.md").read_text()
    model.generate(torch.tensor([[100, 101, 102]]), max_new_tokens=2)

    # The newest checkpoint that is whole, and without the data no tokenizer of another kind.
    newest = run / "checkpoints" / "step=2.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = "moved"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    with pytest.warns(match=r"damaged: .*step=2\.ckpt"):
        _export(run, "--out", "model", "--overwrite")
    said = capsys.readouterr()
    assert "after 1 steps" in said.out
    assert "no tokenizer is written: data.path moved" in said.err
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_refused_in_one_line(run, tmp_path, capsys):
    def refused(error, *arguments):
        _export(*arguments, error=error, capsys=capsys)

    capsys.readouterr()
    checkpoint = run / "checkpoints" / "step=2.ckpt"
    refused("there is nothing at nowhere", "nowhere", "--out", "model")
    refused("--dtype must be one of float32, bfl", run, "--out", "model", "--dtype", "int8")
    refused("checkpoints is there already; --overwrite", run, "--out", run / "checkpoints")
    refused("holds no model that", run, "--out", run / "checkpoints", "--overwrite")
    refused("neither a checkpoint nor the directory of a run", tmp_path, "--out", "model")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "epoch": 1}, foreign)
    refused("does not say which models it holds", foreign, "--out", "model")
    state = torch.load(checkpoint, weights_only=True)
    del state["state_dict"]["model.model.norm.weight"]
    torch.save(state, foreign)
    refused("foreign.ckpt lacks model.model.norm.weight", foreign, "--out", "model")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    refused("step=2.ckpt is damaged", checkpoint, "--out", "model")
    foreign.write_text("no checkpoint")
    refused("foreign.ckpt is damaged", foreign, "--out", "model")
    (tmp_path / "step=9.ckpt").mkdir()
    refused("step=9.ckpt", tmp_path / "step=9.ckpt", "--out", "model")
    assert not (tmp_path / "model").exists()


def _same_files(one, other):
    names = {path.name for path in one.iterdir()}
    assert {path.name for path in other.iterdir()} == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_adapters_are_merged_or_written_alone(config, tmp_path, capsys):
    architecture = config["model"].pop("architecture")
    build_model(architecture=architecture).save_pretrained("base")
    config["model"]["pretrained"] = "base"
    config["data"]["tokenizer"] = "bytes"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    # Without a key in the file, and in the precision that has two dtypes.
    fit = ["fit", "--config", "small.yaml", "--trainer.precision", "bf16-mixed"]
    fit += ["--model.lora.rank", "4", "--model.lora.train_embeddings", "true"]
    assert main(fit) == 0
    run = tmp_path / "runs" / "small"
    lora = yaml.safe_load((run / "config.yaml").read_text())["model"]["lora"]
    assert (lora["rank"], lora["targets"]) == (4, None)

    _export(run, "--out", "model")
    _same_files(tmp_path / "model", run / "huggingface")
    merged = AutoModelForCausalLM.from_pretrained("model")
    assert merged.dtype == torch.bfloat16
    assert law_of(sparsify(merged)).budget.floor == 32
    _export(run, "--out", "adapter", "--adapter")
    _same_files(tmp_path / "adapter", run / "adapter")
    assert "adapter: adapters of rank 4 after 2 steps" in capsys.readouterr().out

    def refused(error, *arguments):
        _export(*arguments, error=error, capsys=capsys)

    refused(
        "model is there already; --overwrite replaces an adapter",
        run,
        "--out",
        "model",
        "--adapter",
    )
    refused("holds no adapter", run, "--out", "model", "--adapter", "--overwrite")
    last = ["--ckpt_path", "last"]
    (tmp_path / "base").rename("moved")
    assert main([*fit, *last]) == 2
    assert "model.pretrained: there is no directory base" in capsys.readouterr().err
    refused(f"there is no directory {tmp_path / 'base'}", run, "--out", "again")
    _export(run, "--out", "again", "--base", "moved")
    _same_files(tmp_path / "again", run / "huggingface")
    # Another model of the same shapes.
    torch.manual_seed(5)
    build_model(architecture=architecture).save_pretrained("base")
    assert main([*fit, *last]) == 2
    assert "model.pretrained: the weights in" in capsys.readouterr().err
    refused("--base: the weights in base are not those", run, "--out", "no", "--base", "base")
