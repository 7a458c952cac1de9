"""The writer of Hugging Face directories: files, tied weights, all or nothing."""

import json

import pytest
import torch
from families import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_sparse.data import ByteTokenizer
from lit_sparse.models.export.card import Training, is_own_card
from lit_sparse.models.export.write import check_replaceable, stored_tensors, write_model


def _write(model, directory, dtype=torch.float32, read=None, **options):
    held = stored_tensors(model)
    weights = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in held.items()}
    write_model(model, directory, weights, read or (lambda n: held[n].detach()), **options)


@pytest.mark.parametrize("tied", [False, True])
def test_is_what_save_pretrained_writes(kind, tiny, tmp_path, tied):
    model = tiny(kind, tie_word_embeddings=tied)
    _write(model, tmp_path / "ours", shard_size="60KB")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    assert len(names) > 4
    for name in names:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        assert ours.stat().st_mode == (tmp_path / "ours" / "config.json").stat().st_mode
        if name.endswith(".safetensors"):
            assert ours.read_bytes() == theirs.read_bytes()
        elif name.endswith("index.json"):
            index = json.loads(theirs.read_text())
            assert json.loads(ours.read_text())["weight_map"] == index["weight_map"]
        else:
            assert ours.read_text() == theirs.read_text()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32}),
    ],
)
def test_experts_are_written_one_by_one(family, config, tmp_path):
    """As others read them, vLLM for one: transformers stacks them where it loads them."""
    model = build(family, num_experts_per_tok=2, **config)
    held = stored_tensors(model)
    read = []
    _write(model, tmp_path / "ours", read=lambda n: (read.append(n), held[n].detach())[1])
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert any(".experts.3." in name for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(read) == sorted(held), "each stack is read once"


def test_another_dtype(tiny, tmp_path):
    model = tiny()
    _write(model, tmp_path / "model", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_replaces_a_model_as_a_whole(tiny, tmp_path):
    directory = tmp_path / "model"
    _write(tiny(), directory, shard_size="60KB")
    before = {path.name for path in directory.iterdir()}
    assert "model.safetensors.index.json" in before

    def fail(name):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        _write(tiny(), directory, read=fail)
    assert {path.name for path in directory.iterdir()} == before
    assert list(tmp_path.iterdir()) == [directory]

    _write(tiny(seed=1), directory)
    assert "model.safetensors.index.json" not in {path.name for path in directory.iterdir()}
    held = load_file(directory / "model.safetensors")
    assert torch.equal(held["lm_head.weight"], tiny(seed=1).lm_head.weight)


def test_what_is_no_model_is_not_replaced(tmp_path):
    check_replaceable(tmp_path / "nothing")
    check_replaceable(tmp_path)
    (tmp_path / "thesis.tex").write_text("")
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ValueError, match="holds no model that could be replaced"):
            check_replaceable(path)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_tied_weights_of_gemma(tiny, tokens, tmp_path, kind):
    """They are tied unless the config says otherwise."""
    model = tiny(kind)
    _write(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_generation_config(tiny, tmp_path):
    """A new model's special tokens are the tokenizer's; a pretrained one's stay as they are."""
    new = tiny(vocab_size=257, pad_token_id=None, eos_token_id=None)
    _write(new, tmp_path / "new", tokenizer=ByteTokenizer())
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "new").generation_config
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (None, 256, 256)

    new.generation_config = GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=[7, 8])
    _write(new, tmp_path / "kept", tokenizer=ByteTokenizer())
    written = GenerationConfig.from_pretrained(tmp_path / "kept")
    assert (written.temperature, written.eos_token_id) == (0.6, [7, 8])
    assert written.pad_token_id is None


def test_a_tokenizer_takes_the_whole_context(tiny, tmp_path):
    ByteTokenizer().save_pretrained(tmp_path / "tokenizer")
    short = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", model_max_length=128)
    for positions, expected in ((64, 128), (512, 512)):
        _write(tiny(max_position_embeddings=positions), tmp_path / "model", tokenizer=short)
        assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == expected


def test_a_card_replaces_a_card_but_nothing_of_the_user(tiny, tmp_path):
    directory = tmp_path / "model"
    for steps in (1, 2):
        _write(tiny(), directory, training=Training(steps))
        assert is_own_card(directory / "README.md")
        assert f"{steps} optimizer steps" in (directory / "README.md").read_text()

    changed = (directory / "README.md").read_text() + "And what I found.\n"
    (directory / "README.md").write_text(changed)
    for steps in (3, 4):
        with pytest.warns(UserWarning, match=r"README\.md is your own.*card is MODEL_CARD\.md"):
            _write(tiny(), directory, training=Training(steps))
        assert (directory / "README.md").read_text() == changed
        assert f"{steps} optimizer steps" in (directory / "MODEL_CARD.md").read_text()
