"""The model card says what is known, in numbers, and invents nothing."""

import yaml

from lit_sparse.budget import Budget
from lit_sparse.models import extend_context, sparsify
from lit_sparse.models.export.card import CardFacts, Training, is_own_card, model_card

STAGES = [
    {"length": 512, "steps": 10, "rope": None, "attention": "dense"},
    {"length": 2048, "steps": 20, "rope": {"rule": "yarn"}, "attention": "sparse"},
]


def card(model, **training):
    config = model.config.to_dict()
    facts = CardFacts(config, "LlamaForCausalLM", 12345, "bfloat16", Training(30, **training))
    return model_card(facts)


def front_matter(text):
    return yaml.safe_load(text.split("---")[1])


def test_law_stages_and_gap(tiny):
    budget = Budget(alpha=2.0, exponent=0.5, floor=32, sink=16)
    model = sparsify(tiny(), budget, layers={1: Budget.dense()}, block=16, tile=32)
    extend_context(model, [(2048, {"rule": "yarn"})])
    measured = {"gap/captured_mass": 0.91234, "gap/kl": 0.01234, "train/loss": 5.0}
    text = card(model, stages=STAGES, measured=measured)
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-attention", "long-context", "lit-sparse"],
    }
    assert (
        "Trained by lit-sparse: 12,345 parameters in bfloat16, for contexts up to 2,048 tokens"
        in text
    )
    assert "k(n) = alpha * n^C of them" in text
    assert "91 at 2,048 tokens" in text  # 2 * sqrt(2048) = 90.5
    for row in ("alpha | 2", "C | 0.5", "floor | 32", "block | 16", "tile | 32", "1 | dense"):
        assert f"| {row} |" in text
    assert "| 1 | 512 | 10 | as before | dense |" in text
    assert '| 2 | 2,048 | 20 | {"rule": "yarn"} | sparse |' in text
    assert "| 0.912 |" in text
    assert "| 0.0123 |" in text
    assert text.count("not measured") == 3
    assert "lit_sparse.sparsify(model)" in text
    assert "rope_type yarn" in text
    assert "vLLM derives a context of 2,048 tokens" in text


def test_what_is_not_known(tiny):
    text = card(tiny())
    assert "dense attention" in text
    assert "sparsify" not in text
    assert "30 optimizer steps; no curriculum is recorded" in text
    assert text.count("not measured") == 5
    assert "base_model" not in front_matter(text)
    # A stage that training did not reach, or finish.
    text = card(tiny(), stages=[*STAGES[:1], {**STAGES[1], "steps": 90}, STAGES[1]])
    assert "| 2 | 2,048 | 20 of 90 |" in text
    assert "| 3 |" not in text


def test_merged_adapters(tiny):
    lora = {"rank": 8, "alpha": 16.0, "targets": None}
    some = card(tiny(), lora={**lora, "train_norms": True, "train_embeddings": False})
    assert "LoRA of rank 8, alpha 16, merged into the weights; trained: the projections of" in some
    assert "attention, norms." in some
    assert "LoRA" not in card(tiny())


def test_base_model(tiny):
    cached = (
        "/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de362430cd3b72f300e6b0f18e50e7166e08"
    )
    text = card(tiny(), pretrained=cached)
    assert front_matter(text)["base_model"] == "meta-llama/Llama-3.2-1B"
    assert "from meta-llama/Llama-3.2-1B:" in text
    # Any other directory is no name on the Hub, and its path is nobody's business.
    text = card(tiny(), pretrained="/home/me/models/mine")
    assert "base_model" not in front_matter(text)
    assert "from the directory `mine`:" in text
    assert "/home/me" not in text


def test_sliding_layers_and_a_logarithmic_law(tiny):
    model = tiny("gemma3_text", sliding_window=24)
    model.config.sparse_attention = {"budget": Budget.log(20.0).to_dict()}
    text = card(model)
    assert "alpha * ln(n)" in text
    assert "| C |" not in text
    assert "Layers 0 keep the model's sliding window" in text
    # Phi-3 for 128k: a window that reaches further than the model is none.
    model.config.sliding_window = model.config.max_position_embeddings
    assert "sliding window" not in card(model)


def test_where_vllm_differs(tiny):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    linear = {"rope_type": "linear", "factor": 4.0}
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_type": "longrope"}
    longrope = {**factors, "original_max_position_embeddings": 64}
    cases = {
        "derives 2,048 tokens, the original context * factor": yarn,
        "ignores attention_factor": {**yarn, "attention_factor": 1.0},
        "derives a context of 2,048 tokens": linear,
        "is the context before scaling, 512": linear,
        "unless `--max-model-len 512` says more": longrope,
        "attention factor is 1.2247, not 1.0000": {**longrope, "attention_factor": 1.0},
        "whatever the sequence": {"rope_type": "dynamic", "factor": 2.0},
    }
    for said, rope in cases.items():
        model = tiny(rope_parameters={"rope_theta": 1e4, **rope})
        assert said in card(model), said
        assert said not in card(tiny()), said


def test_a_changed_card_is_recognised(tiny, tmp_path):
    path = tmp_path / "README.md"
    text = card(tiny(), stages=STAGES)
    path.write_text(text)
    assert is_own_card(path)
    for other in (text.replace("12,345", "12,346"), text + "More.\n", "# Mine\n", ""):
        path.write_text(other)
        assert not is_own_card(path)
