"""Adapters on shards of real DeepSpeed engines, two gloo ranks: they are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse.cli import main
from lit_sparse.distributed.stored_weights import checkpoint_weights

pytest.importorskip("deepspeed")

DEFAULT = ["3"]
MORE = ["ddp", "1", "2", "3-memory", "3-bfloat16", "3-sequence"]
IDS = torch.arange(1, 40)[None]


def _run(out, *names):
    command = [sys.executable, Path(__file__).with_name("lora.py"), out, *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("lora"), "alone", *DEFAULT)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("lora"), "alone", *MORE)


@pytest.fixture(params=[*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def case(request):
    """Name of a case, and where it is."""
    return request.param, request.getfixturevalue("more" if request.param in MORE else "default")


def _seen(out, *names):
    return torch.load(out.joinpath(*names, "seen.pt"))


def test_all_ranks_start_with_the_adapters_of_one_process(case):
    name, out = case
    alone, seen = _seen(out, "alone")["before"], _seen(out, name)["before"]
    assert seen.keys() == alone.keys()
    for key, values in alone.items():
        assert torch.equal(seen[key], values.to(seen[key].dtype)), key


def test_gradients_and_steps_are_those_of_one_process(case):
    name, out = case
    if name == "3-bfloat16":
        pytest.skip("one process has float32 weights")
    alone, seen = _seen(out, "alone"), _seen(out, name)
    assert seen["gradients"].keys() == alone["gradients"].keys() == alone["before"].keys()
    for key, values in alone["gradients"].items():
        assert values.norm() > 0, key
        assert (seen["gradients"][key] - values).norm() <= 1e-5 * values.norm(), key
        torch.testing.assert_close(seen["after"][key], alone["after"][key], rtol=0, atol=2e-6)
    assert seen["norm"] == pytest.approx(alone["norm"], rel=1e-5)


def test_a_continued_run_is_the_run_that_was_not_stopped(case):
    name, out = case
    whole, again = _seen(out, name)["after"], _seen(out, name, "again")["after"]
    for key, values in whole.items():
        assert torch.equal(again[key], values), key


def test_checkpoints_hold_what_trained_alone(case):
    name, out = case
    checkpoint = out / name / "checkpoints" / "step=2.ckpt"
    trained = set(_seen(out, name)["after"]) | {"model.lm_head.weight"}  # tied to the embeddings
    if checkpoint.is_file():
        assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == trained
        return
    assert checkpoint_weights(checkpoint).keys() == trained
    for path in checkpoint.rglob("*model_states.pt"):
        held = torch.load(path, weights_only=False)
        assert held["module"].keys() <= trained
        assert not held["frozen_param_fragments"]


def test_plain_transformers_and_peft_have_the_logits_of_the_merged_model(case, tmp_path):
    """What a run leaves, and what lit-sparse export makes of its checkpoint."""
    name, out = case
    source = str(out / name / "checkpoints" / "step=2.ckpt")
    assert main(["export", source, "--out", str(tmp_path / "model")]) == 0
    assert main(["export", source, "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out / name / "huggingface")
    low = name == "3-bfloat16"
    assert merged.dtype == (torch.bfloat16 if low else torch.float32)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "model")]
    for adapter in (out / name / "adapter", tmp_path / "adapter"):
        config = AutoConfig.from_pretrained(adapter / "model_config.json")
        base = AutoModelForCausalLM.from_pretrained(
            out / "qwen3", config=config, dtype=merged.dtype
        )
        models.append(peft.PeftModel.from_pretrained(base, adapter))
    with torch.no_grad():
        wanted = merged(IDS).logits.float()
        for model in models:
            got = model.eval()(IDS).logits.float()
            assert (got - wanted).norm() <= (0.05 if low else 1e-5) * wanted.norm()
    after = _seen(out, name)["after"]
    stored = load_file(out / name / "huggingface" / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied
    embeddings = after["model.model.embed_tokens.weight"]
    assert torch.equal(stored["model.embed_tokens.weight"], embeddings.to(merged.dtype))


def test_other_adapters_cannot_go_on_from_shards(default):
    said = (default / "3" / "refused.txt").read_text()
    assert "the adapters of the checkpoint are others: it has model.lora.rank: 4" in said
