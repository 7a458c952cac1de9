"""Every supported family against the attention of its own class, in float32.

The README's table has what these tests ran, and nothing else.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch

from lit_sparse.attention.probe import probe_rows
from lit_sparse.budget import Budget
from lit_sparse.models import attention_layers, dense_attention, law_layers, observe, sparsify
from lit_sparse.models.support import SUPPORTED

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, NAMES, VARIANTS, WINDOW, build, table

README = Path(__file__).parents[2] / "README.md"
BLOCK, TILE = 8, 8
TIGHT = Budget.fixed(40, sink=8, late=0.3)
LENGTHS = (93, 1, 47)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the law changes nothing"),
    pytest.mark.filterwarnings("ignore:.*below what is always kept"),
]


@pytest.fixture(params=VARIANTS, ids=NAMES)
def model(request):
    kind, variant = request.param
    model = build(kind, **variant)
    model.set_attn_implementation("eager")
    return model


def close(actual, expected, name=""):
    difference, size = (actual - expected).abs().max(), expected.abs().max()
    assert difference <= 1e-4 * size + 1e-6, f"{name}: {difference} of {size}"


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logits * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(ours, theirs, actual, expected):
    """Logits and the gradients of every parameter."""
    close(actual, expected, "logits")
    expected_gradients = gradients(theirs, expected)
    for name, gradient in gradients(ours, actual).items():
        assert expected_gradients[name].abs().max() > 0, name
        close(gradient, expected_gradients[name], name)


def packed(tokens):
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return tokens(1, sum(LENGTHS)), positions


def test_everything_kept_is_the_attention_of_the_class(model, tokens):
    ours = sparsify(copy.deepcopy(model), Budget.dense(), block=BLOCK, tile=TILE)
    ids = tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :17], mask[2, -41:] = 0, 0
    real = mask.bool()
    given = {"attention_mask": mask, "use_cache": False}
    actual = ours(ids, **given).logits
    assert actual.isfinite().all()
    compare(ours, model, actual[real], model(ids, **given).logits[real])
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            close(actual[real], model(ids, **given).logits[real], "sdpa")
        model.set_attn_implementation("eager")

    # Documents in a row are those documents alone, which not every class of transformers does.
    ids, positions = packed(tokens)
    alone = [model(piece, use_cache=False).logits for piece in ids.split(LENGTHS, 1)]
    actual = ours(ids, position_ids=positions, use_cache=False).logits
    compare(ours, model, actual, torch.cat(alone, 1))


def test_a_budget_that_drops_is_the_class_under_the_selections_mask(model, tokens):
    """Its own eager attention, given the mask of each layer's selection and window."""
    ours = sparsify(copy.deepcopy(model), TIGHT, block=BLOCK, tile=TILE)
    ids, positions = packed(tokens)
    masks, sharpest = {}, []

    def look(layer, q, k, v, out, lse, selection, options, documents):
        assert documents.cu_seqlens == (0, 93, 94, 141)
        seen = selection.to_mask(options.window).repeat_interleave(q.shape[1] // k.shape[1], 0)
        masks[layer] = torch.zeros(1, *seen.shape).masked_fill(~seen, -torch.inf)
        assert (options.window is None) == (layer in law_layers(model))
        if options.window is None:
            assert selection.density < 0.8
            rows = torch.arange(60, 93)
            found = probe_rows(q, k, v, selection, rows, options, out=out, lse=lse)
            assert found.tau.max() > 0.01
            sharpest.append(found.max_weight.mean())

    with observe(ours, look):
        actual = ours(ids, position_ids=positions, use_cache=False).logits
    assert min(sharpest, default=1) > 0.2, "attention that is flat tests little"

    def give(layer):
        return lambda _, args, kwargs: (args, {**kwargs, "attention_mask": masks[layer]})

    for layer, module in attention_layers(model):
        module.register_forward_pre_hook(give(layer), with_kwargs=True)
    expected = model(ids, position_ids=positions, use_cache=False).logits
    compare(ours, model, actual, expected)


def test_dense_attention_leaves_windows_alone(model, tokens):
    ours = sparsify(copy.deepcopy(model), TIGHT, block=BLOCK, tile=TILE)
    densities = {}

    def look(layer, *call):
        assert call[6].window in (None, WINDOW)
        densities.setdefault(layer, []).append(call[5].density)

    ids = tokens(1, 90)
    with torch.no_grad(), observe(ours, look):
        ours(ids, use_cache=False)
        with dense_attention(ours):
            actual = ours(ids, use_cache=False).logits
        close(actual, model(ids, use_cache=False).logits)
    for layer, (sparse, dense) in densities.items():
        assert (dense == 1) == (layer in law_layers(model))
        assert (sparse < dense) == (layer in law_layers(model))


def test_cached_decoding(model, tokens):
    """Prefill, a chunk and single tokens, past the window, whose cache drops what it leaves; with
    padding on the left.
    """
    ours = sparsify(copy.deepcopy(model), Budget.dense(), block=BLOCK, tile=TILE)
    ids = tokens(2, 40)
    for padding in (0, 11):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        real, cache, pieces, seen = mask.bool(), None, [], 0
        with torch.no_grad():
            for piece in ids.split((29, 9, 1, 1), 1):
                seen += piece.shape[1]
                given = {"attention_mask": mask[:, :seen], "past_key_values": cache}
                step = ours(piece, **given, use_cache=True)
                cache = step.past_key_values
                pieces.append(step.logits)
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        close(torch.cat(pieces, 1)[real], expected[real])


def test_the_readme_says_what_was_tested():
    assert sorted(family.kind for family in FAMILIES) == sorted(SUPPORTED)
    assert table() in README.read_text(encoding="utf-8"), "run python tests/models/families.py"
