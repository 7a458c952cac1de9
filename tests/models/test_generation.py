"""generate() of a sparse model: caches, padding, sampling and beams, against the definition."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from lit_sparse.attention.reference import select_blocks
from lit_sparse.budget import Budget
from lit_sparse.models import dense_attention, observe, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from families import VARIANTS, WINDOW, build

BUDGET = Budget.fixed(96, sink=16, local=0.25)
LENGTHS = (200, 163)
SHORT = (WINDOW - 3, WINDOW - 9)
"""Prompts that fill a window while tokens are decoded."""
NEW = 6
# One window for all layers, windows in some, none.
CACHES = [
    variant
    for variant in VARIANTS
    if variant[0] in ("llama", "mistral", "gemma2", "gemma3_text", "gpt_oss")
]


@pytest.fixture(params=CACHES, ids=[f"{kind}{i}" for i, (kind, _) in enumerate(CACHES)])
def family(request):
    """Builds the same random model at every call."""

    def fresh():
        kind, variant = request.param
        model = build(kind, **variant)
        model.set_attn_implementation("eager")
        return model

    return fresh


@pytest.fixture(params=["llama", "qwen3"])
def model(request, tiny):
    return sparsify(tiny(request.param), BUDGET, block=16, tile=16)


@pytest.fixture
def llama(tiny):
    return sparsify(tiny("llama"), BUDGET, block=16, tile=16)


def prompts(tokens, lengths=LENGTHS, side="left"):
    """Prompts of these lengths in a batch, and its mask."""
    ids = tokens(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = max(lengths) - length
        if padding:
            mask[row, slice(padding) if side == "left" else slice(-padding, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, batch, **options):
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    out = model.generate(**batch, **{**settings, **options})
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def attend(q, k, v, scale):
    """One row's attention by the definition. q [Hq, D]; k, v [n, Hkv, D] -> [Hq, D]."""
    q, k, v = q.double(), k.double(), v.double()
    kept = select_blocks(
        q[None], k, BUDGET, [1], key_lengths=[len(k)], scale=scale, block=16, tile=1
    )
    out, groups = torch.zeros_like(q), q.shape[0] // k.shape[1]
    for (_, head, _), blocks in kept.items():
        keys = torch.cat([torch.arange(16 * b, min(16 * b + 16, len(k))) for b, _ in blocks])
        rows = slice(head * groups, (head + 1) * groups)
        out[rows] = (scale * q[rows] @ k[keys, head].T).softmax(1) @ v[keys, head]
    return out


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_is_the_definition(model, tokens, cache):
    """Each step is a tile of one row over the keys of its own prompt."""
    checked, kept = 0, []

    def check(layer, q, k, v, out, lse, selection, options, documents):
        nonlocal checked
        if len(q) > len(LENGTHS):
            return  # the prompts
        scale = getattr(options, "scale", options)
        keys = documents.cu_seqlens_k
        for row in range(len(q)):
            mine = slice(keys[row], keys[row + 1])
            torch.testing.assert_close(
                out[row].double(), attend(q[row], k[mine], v[mine], scale), rtol=1e-5, atol=1e-6
            )
            checked += 1
        assert [end - begin for begin, end in pairwise(keys)] == [
            length + 1 + len(kept) // 2 for length in LENGTHS
        ]
        kept.append(selection.density)

    with observe(model, check):
        generate(model, prompts(tokens), cache_implementation=cache)
    assert checked == 2 * len(LENGTHS) * (NEW - 1)
    assert max(kept) < 0.7


@pytest.mark.filterwarnings("ignore:.*the law changes nothing")
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT], ids=["long", "short"])
def test_every_cache_of_every_family(family, tokens, lengths):
    """Padded or alone, from a dynamic or a static cache: the same tokens and logits."""
    model = sparsify(family(), BUDGET, block=16, tile=16)
    batch = prompts(tokens, lengths)
    together, logits = generate(model, batch, cache_implementation="dynamic")
    static = generate(model, batch, cache_implementation="static")
    assert torch.equal(static[0], together)
    torch.testing.assert_close(static[1], logits, rtol=1e-5, atol=1e-5)
    for row, length in enumerate(lengths):
        alone = {"input_ids": batch["input_ids"][row : row + 1, -length:]}
        ids, expected = generate(model, alone)
        assert torch.equal(ids[0], together[row])
        torch.testing.assert_close(logits[row], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*the law changes nothing")
def test_a_budget_that_keeps_everything_is_dense(family, tokens):
    batch = prompts(tokens)
    expected, logits = generate(family(), batch)
    model = sparsify(family(), Budget.dense(), block=16, tile=16)
    for cache in ("dynamic", "static"):
        ids, ours = generate(model, batch, cache_implementation=cache)
        assert torch.equal(ids, expected)
        torch.testing.assert_close(ours, logits, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_compiled_decoding(tiny, tokens):
    """What transformers does by itself on a GPU: a static cache and a compiled forward."""
    llama = sparsify(tiny("llama", num_hidden_layers=1), BUDGET, block=16, tile=16)
    batch = prompts(tokens)
    expected, logits = generate(llama, batch)
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    options = {"cache_implementation": "static", "compile_config": compiling}
    ids, ours = generate(llama, batch, **options)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)


def test_sampling_and_beams(llama, tokens):
    batch = prompts(tokens)
    for options in ({"do_sample": True, "top_k": 20}, {"num_beams": 3}):
        found = []
        for cache in ("dynamic", "static"):
            torch.manual_seed(0)
            found.append(generate(llama, batch, cache_implementation=cache, **options)[0])
        assert torch.equal(*found)
        assert not torch.equal(found[0], generate(llama, batch)[0])
    # Beams of one prompt, which stand in the batch as rows, are those of the prompt alone.
    alone = {"input_ids": batch["input_ids"][1:, -LENGTHS[1] :]}
    assert torch.equal(generate(llama, alone, num_beams=3)[0][0], found[1][1])


def test_prompts_padded_on_the_right_are_refused(llama, tokens):
    for cache in ("dynamic", "static"):
        with pytest.raises(ValueError, match=r"row 1 has padding between.*prompts on the left"):
            generate(llama, prompts(tokens, side="right"), cache_implementation=cache)


@torch.no_grad()
def test_a_static_cache_without_a_mask(llama, tokens):
    """Forwards by hand: transformers knows how much of the cache is filled."""
    ids = tokens(2, 150)
    cache = StaticCache(llama.config, max_cache_len=256)
    steps = [
        llama(part, past_key_values=cache, use_cache=True).logits
        for part in (ids[:, :148], ids[:, 148:149], ids[:, 149:])
    ]
    past = llama(ids[:, :148], use_cache=True)
    expected = [past.logits]
    for part in (ids[:, 148:149], ids[:, 149:]):
        past = llama(part, past_key_values=past.past_key_values, use_cache=True)
        expected.append(past.logits)
    for ours, theirs in zip(steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="covers 1 tokens, but with the cached ones there are 151"):
        llama(ids[:, :1], past_key_values=past.past_key_values, attention_mask=mask)


def test_an_export_generates_dense_and_sparse(llama, tokens, tmp_path):
    batch = prompts(tokens)
    sparse = generate(llama, batch)
    with dense_attention(llama):
        dense = generate(llama, batch)
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, logits = generate(loaded, batch)
    assert torch.equal(ids, dense[0])
    torch.testing.assert_close(logits, dense[1], rtol=2e-4, atol=2e-4)
    ids, logits = generate(sparsify(loaded), batch)
    assert torch.equal(ids, sparse[0])
    assert torch.equal(logits, sparse[1])
    assert math.isfinite(float(logits.sum()))
    assert not torch.allclose(sparse[1], dense[1], atol=1e-2)
