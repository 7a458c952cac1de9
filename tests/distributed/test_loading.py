"""What a directory has to hold to be loaded in shards; every rank says so before any is sent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lit_sparse.distributed.loading import load_pretrained
from lit_sparse.models import build_model

pytest.importorskip("deepspeed")

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
STAGE_3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def directory(tmp_path):
    build_model(architecture=ARCHITECTURE).save_pretrained(tmp_path)
    return tmp_path


def _lose(tensors):
    del tensors["model.norm.weight"]


def _add(tensors):
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(16, 8)


def _reshape(tensors):
    tensors["model.norm.weight"] = torch.zeros(9)


def _quantize(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose, r"the files of .* lack the tensor model\.norm\.weight \[8\]"),
        (_add, r".*model\.safetensors has a tensor model\.layers\.0\.self_attn\.qkv_proj\.weight"),
        (_reshape, r"model\.norm\.weight in .* is F32 \[9\], .* asks for .* \[8\]"),
        (_quantize, r"model\.norm\.weight in .* is I8 \[8\], .* floating point \[8\]"),
    ],
)
def test_tensors_that_are_not_the_models(directory, change, message):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.pretrained: {message}"):
        load_pretrained(directory, STAGE_3)


def test_tied_weights_that_are_stored_twice(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"has model\.embed_tokens\.weight and lm_head\.weight"):
        load_pretrained(directory, STAGE_3)


def test_a_damaged_file(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.pretrained: .*model\.safetensors is damaged"):
        load_pretrained(directory, STAGE_3)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_would_have_to_be_put_together(tmp_path, kind):
    experts = {"num_experts": 2, "num_experts_per_tok": 1}
    model = build_model(architecture={**ARCHITECTURE, **experts, "model_type": kind})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type {kind}, whose .* experts .*stage to 2"):
        load_pretrained(tmp_path, STAGE_3)


def test_a_model_whose_names_are_not_known(tmp_path):
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is of model_type gpt2; ZeRO stage 3 loads llama, mis"):
        load_pretrained(tmp_path, STAGE_3)
