"""A sparsified model under a budget that drops blocks."""

import copy
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.attention.options import Options
from lit_sparse.budget import Budget
from lit_sparse.models import (
    dense_attention,
    documents,
    is_sparse,
    law_of,
    observe,
    set_dense,
    sparsify,
)

sys.path.insert(0, str(Path(__file__).parent))
from families import VARIANTS, build

BUDGET = Budget.fixed(96, sink=16, local=0.25)
LENGTH = 256


@pytest.fixture
def sparse(kind, tiny):
    return sparsify(tiny(kind), BUDGET, block=16, tile=16)


@pytest.fixture
def llama(tiny):
    return sparsify(tiny("llama"), BUDGET, block=16, tile=16)


@pytest.fixture
def found(monkeypatch):
    """The calls of `find_documents`."""
    calls = []
    real = documents.find_documents

    def counting(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(documents, "find_documents", counting)
    return calls


def train_step(model, ids, **kwargs):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_drops_keys(sparse, kind, tiny, tokens):
    ids = tokens(1, LENGTH)
    densities = []
    with torch.no_grad(), observe(sparse, lambda *seen: densities.append(seen[6].density)):
        logits = sparse(ids, use_cache=False).logits
        dense = tiny(kind)(ids, use_cache=False).logits
    assert logits.isfinite().all()
    assert len(densities) == 2
    assert all(density < 0.75 for density in densities)
    assert (logits - dense).abs().max() > 1e-2
    # A context within the budget is dense.
    torch.testing.assert_close(logits[:, :90], dense[:, :90], rtol=2e-4, atol=2e-4)


def test_packed_documents_are_separate_ones(sparse, tokens):
    lengths = (200, 170, 30)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = sparse(ids, position_ids=positions, use_cache=False).logits
        alone = [sparse(piece, use_cache=False).logits for piece in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=2e-4, atol=2e-4)


def test_padding_changes_nothing(sparse, tokens):
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    with torch.no_grad():
        padded = sparse(ids, attention_mask=mask, use_cache=False).logits
        alone = sparse(ids[1:, 40:], use_cache=False).logits
    torch.testing.assert_close(padded[1:, 40:], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_checkpointing_with_windows_soft_caps_and_sinks(kind, tokens):
    model = build(kind, **dict(VARIANTS)[kind]).train()
    sparsify(model, BUDGET, block=16, tile=16)
    ids, positions = tokens(1, 200), torch.cat([torch.arange(150), torch.arange(50)])[None]
    loss, plain = train_step(model, ids, position_ids=positions)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = train_step(model, ids, position_ids=positions)
    assert torch.equal(loss, again)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_bitwise_the_same(sparse, tokens, found, reentrant):
    sparse.train()
    ids = tokens(2, LENGTH)
    positions = torch.cat([torch.arange(200), torch.arange(56)]).expand(2, -1).contiguous()
    loss, plain = train_step(sparse, ids, position_ids=positions)
    assert len(found) == 1
    sparse.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen = []
    with observe(sparse, lambda layer, *_: seen.append(layer)):
        again, checkpointed = train_step(sparse, ids, position_ids=positions)
    assert seen == [0, 1]
    assert len(found) == 2, "once a forward: the recomputation in backward remembers"
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_checkpointing_keeps_no_lists(llama, tokens):
    """At a million tokens those of all layers are gigabytes."""
    llama.train()
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    ids, lists = tokens(1, LENGTH), []
    with observe(llama, lambda *seen: lists.append(weakref.ref(seen[6].columns))):
        loss = llama(ids, labels=ids, use_cache=False).loss
    assert [alive() for alive in lists] == [None, None]
    loss.backward()


def test_backwards_after_several_forwards(llama, tokens, found):
    """Each recomputation gets the documents of its own forward, however many lie between."""
    llama.train()
    rows = [tokens(1, 200, seed) for seed in (1, 2)]
    cuts = [torch.cat([torch.arange(n), torch.arange(200 - n)])[None] for n in (150, 20)]

    def total():
        llama.zero_grad()
        losses = [
            llama(ids, labels=ids, position_ids=cut, use_cache=False).loss
            for ids, cut in zip(rows, cuts, strict=True)
        ]
        sum(losses).backward()
        return [p.grad.clone() for p in llama.parameters()]

    plain = total()
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(total(), plain, strict=True))
    assert len(found) == 4


def test_compiled(llama, tokens):
    ids = tokens(1, LENGTH)
    loss, plain = train_step(llama, ids)
    compiled = torch.compile(llama, backend="eager")
    compiled_loss, compiled_gradients = train_step(compiled, ids)
    assert torch.equal(compiled_loss, loss)
    for name, gradient in plain.items():
        assert torch.equal(compiled_gradients[f"_orig_mod.{name}"], gradient), name


def test_positions_changed_in_place(llama, tokens):
    """The same tensor with other values is another packing, in inference mode too."""
    ids = tokens(1, 200)
    one = torch.arange(200)[None]
    two = torch.cat([torch.arange(120), torch.arange(80)])[None]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = llama(ids, position_ids=two, use_cache=False).logits
            positions = one.clone()
            first = llama(ids, position_ids=positions, use_cache=False).logits
            positions.copy_(two)
            assert torch.equal(llama(ids, position_ids=positions, use_cache=False).logits, expected)
            assert not torch.equal(first, expected)


def test_documents_are_found_once_a_forward(sparse, tokens, found):
    ids = tokens(2, 64)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for mode in (torch.no_grad, torch.inference_mode):
        for kwargs in ({}, {"attention_mask": mask}):
            found.clear()
            with mode():
                sparse(ids, use_cache=False, **kwargs)
                sparse(ids, use_cache=False, **kwargs)
            assert len(found) == 2


def test_cached_decoding(sparse, tokens, found):
    ids = tokens(2, LENGTH)
    steps = []
    with observe(sparse, lambda *seen: steps.append((seen[0], len(seen[1]), len(seen[2])))):
        out = sparse.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert out.sequences.shape == (2, LENGTH + 3)
    assert all(logits.isfinite().all() for logits in out.logits)
    prefill, decoded = 2 * LENGTH, 2 * (LENGTH + 1)
    layers = [(0, prefill, prefill), (1, prefill, prefill), (0, 2, decoded), (1, 2, decoded)]
    assert steps[:4] == layers
    assert len(found) == 3


def test_masks_and_caches_that_are_refused(llama, tokens):
    ids = tokens(1, 20)
    with pytest.raises(ValueError, match="4D attention mask"):
        llama(ids, attention_mask=torch.zeros(1, 1, 20, 20))
    packed = torch.cat([torch.arange(12), torch.arange(8)])[None]
    cache = llama(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"row 0, token 12.*cached"):
        llama(ids, position_ids=packed, past_key_values=cache)
    cache = llama(ids, position_ids=packed, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="packed documents"):
        llama(ids[:, :1], position_ids=torch.tensor([[8]]), past_key_values=cache)


def test_scale_of_the_layer(tiny, tokens):
    """Not every model scales by 1 / sqrt(head_dim)."""
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    ids = tokens(1, LENGTH)
    selections = []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        sparsify(model, BUDGET, block=16, tile=16)
        with observe(model, lambda _, q, k, *seen: selections.append((q, k, seen[3], seen[4]))):
            model(ids, use_cache=False)
        with dense_attention(model):
            dense = model(ids, use_cache=False).logits
    q, k, selection, options = selections[0]
    assert options == Options(0.5)
    of_scale, of_default = (select(q, k, BUDGET, scale=s, block=16, tile=16) for s in (0.5, None))
    assert torch.equal(selection.columns, of_scale.columns)
    assert not torch.equal(selection.columns, of_default.columns)
    torch.testing.assert_close(dense, expected, rtol=2e-4, atol=2e-4)


def test_autocast_does_not_reach_into_the_operator(llama, tokens):
    seen = []
    observe(llama, lambda *call: seen.append(call))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = llama(tokens(1, LENGTH), use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    _, q, k, v, out, lse, selection, options, _ = seen[1]
    assert {t.dtype for t in (q, k, v, out)} == {torch.bfloat16}
    again = select(q, k, BUDGET, scale=options.scale, block=16, tile=16)
    assert torch.equal(again.columns, selection.columns)
    outside = sparse_attention(q, k, v, again, scale=options.scale)
    assert torch.equal(outside[0], out)
    assert torch.equal(outside[1], lse)


def test_budgets_of_single_layers(kind, tiny, tokens):
    model = sparsify(tiny(kind), BUDGET, layers={1: Budget.dense()}, block=16, tile=16)
    density = {}
    with torch.no_grad(), observe(model, lambda *s: density.update({s[0]: s[6].density})):
        model(tokens(1, LENGTH), use_cache=False)
    assert density[0] < 0.75
    assert density[1] == 1


def test_dense_attention_and_back(sparse, kind, tiny, tokens):
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        before = sparse(ids, use_cache=False).logits
        expected = tiny(kind)(ids, use_cache=False).logits
        with dense_attention(sparse):
            inside = sparse(ids, use_cache=False).logits
        with pytest.raises(KeyError), dense_attention(sparse):
            raise KeyError
        assert torch.equal(sparse(ids, use_cache=False).logits, before)
        set_dense(sparse, True)
        with dense_attention(sparse):
            pass
        assert torch.equal(sparse(ids, use_cache=False).logits, inside)
        set_dense(sparse, False)
        assert torch.equal(sparse(ids, use_cache=False).logits, before)
    torch.testing.assert_close(inside, expected, rtol=2e-4, atol=2e-4)
    assert not torch.equal(inside, before)
    assert law_of(sparse).budget == BUDGET


def test_observers(llama, tokens):
    ids = tokens(2, 130)
    every, second, third = [], [], []
    llama.train()
    first = observe(llama, lambda *seen: every.append(seen))
    with observe(llama, lambda *seen: second.append(seen[0]), layers=[1]):
        observe(llama, lambda *seen: third.append(seen[0]))
        llama(ids, labels=ids, use_cache=False).loss.backward()
    llama(ids, use_cache=False)
    first.remove()
    first.remove()
    llama(ids, use_cache=False)
    assert [seen[0] for seen in every] == [0, 1, 0, 1]
    assert second == [1]
    assert third == [0, 1] * 3
    _, q, k, v, out, lse, selection, options, documents = every[0]
    assert q.shape == out.shape == (260, 4, 16)
    assert k.shape == v.shape == (260, 2, 16)
    assert lse.shape == (260, 4)
    assert lse.dtype == torch.float32
    assert not any(t.requires_grad for t in (q, k, v, out, lse))
    assert options == Options(16**-0.5)
    assert documents.cu_seqlens == (0, 130, 260)
    assert 0 < selection.density <= 1
    # What the observer saw is what the layer computed: row 0 attends to itself only.
    torch.testing.assert_close(out[0], v[0].repeat_interleave(2, 0))


def test_copies_are_independent(llama, tokens):
    ids = tokens(1, LENGTH)
    seen = []
    observe(llama, lambda *_: seen.append(1))
    llama(ids, use_cache=False)
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        assert torch.equal(twin(ids, use_cache=False).logits, llama(ids, use_cache=False).logits)
    assert len(seen) == 4, "the copy has no observer"
    set_dense(twin, True)
    sparsify(twin, Budget.fixed(48, sink=16), block=16, tile=16)
    assert is_sparse(llama)
    assert law_of(llama).budget == BUDGET
    assert law_of(twin).budget != BUDGET
    density = []
    with observe(llama, lambda *s: density.append(s[6].density)):
        llama(ids, use_cache=False)
    assert max(density) < 0.75
