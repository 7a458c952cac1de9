"""Adapters in transformers models: what trains, and what transformers and peft make of it."""

import json
from dataclasses import asdict

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_sparse import Budget, sparsify
from lit_sparse.models import attention_layers, build_model, set_rope
from lit_sparse.models.export.write import stored_tensors, write_model
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.models.lora.base import Base, weights_fingerprint
from lit_sparse.models.lora.checkpoints import check_adapters, describe_adapters, left_out
from lit_sparse.models.lora.merge import merged_weights, write_adapter

EVERYTHING = LoRA(rank=4, alpha=6, train_norms=True, train_embeddings=True)


def _train(model):
    """Move all that trains, B away from 0 too."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.1 * noise).to(parameter.dtype)


def _error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def _trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def logits(tokens):
    @torch.no_grad()
    def compute(model):
        low = any(p.dtype == torch.bfloat16 for p in model.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model.eval()(tokens(2, 60)).logits.float()

    return compute


@pytest.fixture
def base(tiny, tmp_path):
    """A directory of a model, tied or not, in float32 or not."""

    def write(tied=False, dtype="float32"):
        kind = "qwen3" if tied else "llama"
        model = tiny(kind, tie_word_embeddings=tied).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
        return tmp_path / "base"

    return write


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_or_alone_the_logits_are_those_of_the_trained_model(
    base, logits, tmp_path, tied, dtype
):
    directory = base(tied, dtype)
    model = build_model(directory, dtype=dtype)
    before = logits(model)
    within = 0.05 if dtype == "bfloat16" else 1e-5
    add_lora(model, EVERYTHING, Base.of(directory))
    assert _error(logits(model), before) <= within, "B starts at 0"
    _train(model)
    trained = logits(model)
    assert _error(trained, before) > 0.2

    held = stored_tensors(model)
    weights = {name: tensor.detach().to("meta") for name, tensor in held.items()}
    write_model(model, tmp_path / "merged", *merged_weights(model, weights, held.__getitem__))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert str(merged.dtype) == f"torch.{dtype}"
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert _error(logits(merged), trained) <= within

    write_adapter(model, tmp_path / "adapter", weights, held.__getitem__)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert _error(logits(loaded), trained) <= within
    # transformers finds the base by itself.
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype)
    assert _error(logits(found), trained) <= within
    assert _error(logits(loaded.merge_and_unload()), trained) <= within
    alone = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in alone.values()} == {torch.float32}


def test_what_trains(tiny):
    def count(kind="llama", **keys):
        model = tiny(kind)
        names = _trainable(add_lora(model, LoRA(**keys)))
        layers = {name.rpartition(".lora_")[0] for name in names if ".lora_" in name}
        return len(layers), {name for name in names if ".lora_" not in name}

    assert count() == (2 * 4, set())
    assert count(targets="all-linear") == (2 * 7, set())
    assert count(targets=["v_proj", "layers.1.mlp.up_proj"]) == (3, set())
    norms = count("qwen3", train_norms=True)[1]
    assert len(norms) == 2 * 4 + 1
    assert {"model.norm.weight", "model.layers.1.self_attn.q_norm.weight"} <= norms
    assert count(train_embeddings=True)[1] == {"model.embed_tokens.weight"}


def test_the_model_stays_what_it_was_and_is_made_sparse(tiny, tokens):
    model = add_lora(tiny(), LoRA(rank=2))
    assert [layer for layer, _ in attention_layers(model)] == [0, 1]
    set_rope(model, rope_type="linear", factor=2.0)
    sparsify(model, Budget.fixed(32, sink=16, local=0.25), block=16, tile=16)
    _train(model)
    model.base_model(tokens(1, 200)).last_hidden_state.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name


def test_adapters_follow_from_the_seed_alone(tiny):
    def adapters(draws):
        model = tiny()
        torch.manual_seed(7)
        torch.rand(draws)
        state = torch.get_rng_state()
        add_lora(model, LoRA())
        assert torch.equal(torch.get_rng_state(), state)
        return [p for n, p in model.named_parameters() if ".lora_A." in n]

    for one, other in zip(adapters(0), adapters(11), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(one, torch.zeros_like(one))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "model.lora.rank must be a whole number >= 1, got 0"),
        ({"alpha": 0}, "model.lora.alpha must be a finite number > 0, got 0"),
        ({"alpha": float("inf")}, "model.lora.alpha must be a finite number > 0, got inf"),
        ({"dropout": 1.0}, "model.lora.dropout must be at least 0 and below 1, got 1.0"),
        ({"targets": "q_proj"}, "model.lora.targets must be null, all-linear or a list"),
        ({"targets": []}, "model.lora.targets must be null"),
        (
            {"targets": ["q_proj", "query"]},
            "no linear layer of this LlamaForCausalLM is named 'query'; there are down_proj, "
            "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj$",
        ),
        ({"targets": ["embed_tokens"]}, "embed_tokens.*train_embeddings: true"),
        ({"targets": ["lm_head"]}, "lm_head shares its weight with the embeddings"),
    ],
)
def test_bad_values_are_named(tiny, keys, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny(tie_word_embeddings=True), LoRA(**keys))


def test_a_model_without_memory_gets_adapters_without(tiny):
    with torch.device("meta"):
        model = tiny()
    add_lora(model, LoRA(rank=1_000_000))  # 100 MB a layer
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_with_adapters_gets_no_others(tiny):
    model = add_lora(tiny(), LoRA())
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoRA())


def test_a_fingerprint_is_of_the_weights_however_they_are_divided(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weights_fingerprint(tmp_path / "one") == weights_fingerprint(tmp_path / "many")
    tiny(seed=1).save_pretrained(tmp_path / "other")  # of the same shapes
    assert weights_fingerprint(tmp_path / "one") != weights_fingerprint(tmp_path / "other")
    file = tmp_path / "one" / "model.safetensors"
    file.write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        weights_fingerprint(tmp_path / "one")


def test_a_checkpoint_of_other_adapters_or_another_base_is_refused(base, tiny):
    directory = base()
    made = Base.of(directory)
    model = add_lora(build_model(directory), LoRA(rank=4, targets=["q_proj"]), made)
    about = json.loads(json.dumps(describe_adapters(model)))
    check_adapters({"adapters": about}, model)
    assert left_out(model) == {n for n, p in model.named_parameters() if not p.requires_grad}

    def refused(message, lora=None, base=None, adapters=about):
        other = build_model(directory)
        if lora is not None:
            add_lora(other, lora, base)
        with pytest.raises(ValueError, match=message):
            check_adapters({"adapters": adapters}, other)

    message = r"others: it has model\.lora\.rank: 4, not model\.lora\.rank: 2$"
    refused(message, LoRA(rank=2, targets=["q_proj"]))
    refused(r'set model\.lora\.rank: 4, model\.lora\.targets: \["q_proj"\] ')
    refused(r"of a run without it: leave it out", LoRA(), adapters={})
    tiny(seed=1).save_pretrained(directory, max_shard_size="50KB")
    again = LoRA(**asdict(LoRA(rank=4, targets=["q_proj"], dropout=0.5)))
    message = r"model\.pretrained: the weights in .*base are not those that the adapters"
    refused(message, again, Base.of(directory))


def test_a_directory_of_adapters_is_no_pretrained_model(tiny, tmp_path):
    model = tiny()
    add_lora(model, LoRA(), Base(str(tmp_path / "llama"), ""))
    held = stored_tensors(model)
    write_adapter(model, tmp_path / "adapter", held, held.__getitem__)
    with pytest.raises(ValueError, match=r"adapter holds adapters alone, for the model .*llama"):
        build_model(tmp_path / "adapter")
