"""Norms from the weights against the full product, built from the logits of the real modules."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lit_sparse.budget import Budget
from lit_sparse.models import law_layers, observe, sparsify
from lit_sparse.models.norms import distances, logit_norms

sys.path.insert(0, str(Path(__file__).parent))
from families import VARIANTS, build

AT = torch.tensor([0, 1, 7, 60, 300])
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def _with_biases(model):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 3)
    return model.double()


def _logits(model, module, distance):
    """Logits [H, d+1, d+1] of the inputs e_1 .. e_d and 0, queries `distance` after keys.

    Of the module's own projections and transformers' rotation, softmax scale included.
    """
    width = model.config.hidden_size
    inputs = torch.cat([torch.eye(width), torch.zeros(1, width)]).double()
    if hasattr(module, "qkv_proj"):
        heads = (model.config.num_attention_heads, *(2 * [model.config.num_key_value_heads]))
        projected = module.qkv_proj(inputs).split([n * module.head_dim for n in heads], -1)
    else:
        projected = module.q_proj(inputs), module.k_proj(inputs)
    # The rotation of the model's own file; Gemma 3 has one for each kind of layer.
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    kind = ["full_attention"] * (model.config.model_type == "gemma3_text")
    sides = []
    for side, position in zip(projected, (distance, 0), strict=False):
        x = side.unflatten(-1, (-1, module.head_dim)).transpose(0, 1)[None]
        where = torch.full((1, len(inputs)), position)
        sides.append(rotate(x, x, *model.model.rotary_emb(inputs, where, *kind))[0][0])
    q, k = sides[0], sides[1].repeat_interleave(module.num_key_value_groups, 0)
    return module.scaling * q @ k.mT


def _parts(logits):
    """Norms of the parts of weight, query bias, key bias and both biases."""
    both = logits[:, -1:, -1:]
    of_key_bias, of_query_bias = logits[:, :-1, -1:] - both, logits[:, -1:, :-1] - both
    weight = logits[:, :-1, :-1] - of_key_bias - of_query_bias - both
    return [torch.linalg.matrix_norm(x) for x in (weight, of_query_bias, of_key_bias, both)]


OTHERS = {"gemma2": 0, "gemma3_text": 0, "phi3": 1, "gpt_oss": 0}
"""Kind -> which of its variants: soft cap, two rotations, a fused matrix half rotated, sinks."""


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": YARN}], ids=["default", "yarn"])
def test_norms_are_those_of_the_full_product_at_every_distance(tiny, kind, rope):
    model = _with_biases(tiny(kind, **rope))
    found = logit_norms(model, AT)
    assert list(found) == [0, 1]
    _compare(model, found)
    for norms in found.values():
        # Biases were noticed where there are any, and rotation changes the norm.
        assert (norms.query_bias > 0).all() == (kind == "qwen2")
        assert (norms.weight.std(-1) > 1e-3 * norms.weight[:, 0]).all()


@pytest.mark.parametrize(("kind", "variant"), OTHERS.items())
def test_norms_of_layers_that_obey_a_law_in_other_families(kind, variant):
    model = _with_biases(build(kind, **[own for k, own in VARIANTS if k == kind][variant]))
    found = logit_norms(model, AT)
    assert list(found) == law_layers(model)
    _compare(model, found)


def _compare(model, found):
    for layer, norms in found.items():
        module = model.model.layers[layer].self_attn
        for i, distance in enumerate(AT.tolist()):
            expected = _parts(_logits(model, module, distance))
            parts = (norms.weight, norms.query_bias, norms.key_bias, norms.biases)
            for part, brute in zip(parts, expected, strict=True):
                torch.testing.assert_close(part[:, i], brute, rtol=1e-5, atol=1e-6)


def _largest_measured(model, tokens):
    largest = {}

    def observer(layer, q, k, v, out, lse, selection, options, documents):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = options.cap(options.scale * torch.einsum("ihd,jhd->hij", q, keys))
        largest[layer] = logits.abs().amax((1, 2))

    with torch.no_grad(), observe(sparsify(model, Budget.dense()), observer):
        model.base_model(input_ids=tokens)
    return largest


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_no_logit_of_a_model_with_qk_norm_passes_its_ceiling(kind, tokens):
    model = _with_biases(build(kind, **dict(VARIANTS)[kind]))
    norms = logit_norms(model, distances(256))
    measured = _largest_measured(model, tokens(1, 256))
    for layer, own in norms.items():
        ceiling = own.largest_logit(1.0, 256, 0.05)
        assert (measured[layer] <= ceiling).all()
        assert (ceiling < 5 * measured[layer]).all(), "a ceiling that says something"
        assert (ceiling == own.ceiling).all()


def test_no_logit_passes_a_soft_cap(tokens):
    model = build("gemma2", **dict(VARIANTS)["gemma2"]).double()
    (own,) = logit_norms(model, distances(64)).values()
    near, far = (own.largest_logit(size, 64, 0.05) for size in (0.01, 100.0))
    torch.testing.assert_close(far, torch.full_like(far, 10.0))
    assert (near < 0.01).all()
    assert (_largest_measured(model, tokens(1, 64))[1] <= far).all()


def test_the_ceiling_is_attained_across_a_rotated_pair(tiny):
    """The key's weight lies on the other axis of the pair than the query's: a product of the two
    axis by axis would be too small once RoPE turns one into the other."""
    model = tiny(
        "qwen3",
        hidden_size=16,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    module = model.double().model.layers[0].self_attn
    for norm, axis in ((module.q_norm, 0), (module.k_norm, 8)):
        torch.nn.init.constant_(norm.weight, 0.1)
        norm.weight.data[axis] = 2.0
    norms = logit_norms(model, AT)[0]
    query, key = torch.zeros(2, 1, 1, 1, 16, dtype=torch.float64)
    query[..., 0], key[..., 8] = 2 * 4.0, 2 * 4.0  # axes of length sqrt(16) times the weight
    where = torch.arange(50)[None]
    turned = apply_rotary_pos_emb(query, query, *model.model.rotary_emb(query, where))[0]
    largest = (module.scaling * turned @ key.mT).abs().max()
    torch.testing.assert_close(largest, norms.ceiling[0], rtol=1e-3, atol=0)


def test_logits_of_independent_inputs_stay_under_the_predicted_largest(tiny):
    model = _with_biases(tiny("qwen2"))
    bound, pairs = 1.5, 40 * 40
    norms = logit_norms(model, AT)[0]
    module = model.model.layers[0].self_attn
    draw = torch.Generator().manual_seed(0)
    x = bound * (torch.randint(0, 2, (40, 64), generator=draw) * 2.0 - 1).double()
    x = torch.cat([x, torch.ones(40, 1)], 1)
    predicted = norms.largest_logit(bound, pairs, 0.05)
    for distance in AT.tolist():
        logits = _logits(model, module, distance)
        # The form that is 1 at the constant input: what is left of e_j is its own.
        form = logits.clone()
        form[:, :-1, :-1] += logits[:, -1:, -1:] - logits[:, :-1, -1:] - logits[:, -1:, :-1]
        form[:, :-1, -1:] -= logits[:, -1:, -1:]
        form[:, -1:, :-1] -= logits[:, -1:, -1:]
        assert ((x @ form @ x.mT).abs().amax((1, 2)) <= predicted).all()


def test_the_mean_over_distances_is_that_of_all_of_them(tiny):
    model = tiny("llama")
    sampled = logit_norms(model, distances(512, 128))[0]
    every = logit_norms(model, torch.arange(512))[0]
    mean = every.weight.square().mean(-1).sqrt()
    torch.testing.assert_close(sampled.mean_weight, mean, rtol=0.02, atol=0)
    only = logit_norms(model, torch.tensor([0]))[0]
    torch.testing.assert_close(only.mean_weight, every.weight[:, 0])


def test_distances_are_near_ones_and_even_ones():
    assert distances(1).tolist() == [0]
    assert distances(10).tolist() == list(range(10))
    far = distances(131072)
    assert far[:64].tolist() == list(range(64))
    assert far[-1] == 131071
    assert len(far) <= 64 + 256


def test_a_model_of_another_type_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=11)
    with pytest.raises(ValueError, match="model_type gpt2 is not supported"):
        logit_norms(AutoModelForCausalLM.from_config(config), AT)
