"""A sparsified model under torch.compile(fullgraph=True): one graph, the numbers of eager mode."""

import sys
from pathlib import Path

import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.models import documents, observe, set_budget, set_dense, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from families import VARIANTS, build

BUDGET = Budget.fixed(96, sink=16, local=0.25)
LENGTH = 192


class Compiled:
    """A model, its compiled self and how often it was compiled."""

    def __init__(self, model, backend="eager"):
        self.model, self.graphs = model, 0
        inner = torch._dynamo.lookup_backend(backend)

        def counting(graph, inputs):
            self.graphs += 1
            return inner(graph, inputs)

        torch._dynamo.reset()
        self.compiled = torch.compile(model, backend=counting, fullgraph=True)

    def train_step(self, compiled, ids, **batch):
        self.model.zero_grad()
        run = self.compiled if compiled else self.model
        loss = run(ids, labels=ids, use_cache=False, **batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in self.model.parameters())]

    def check(self, ids, **batch):
        eager, compiled = (self.train_step(c, ids, **batch) for c in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.fixture
def llama(tiny):
    return sparsify(tiny("llama").train(), BUDGET, block=16, tile=16)


@pytest.fixture
def one_layer(tiny):
    return sparsify(tiny("llama", num_hidden_layers=1).train(), BUDGET, block=16, tile=16)


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def test_packed_documents(llama, tokens):
    case = Compiled(llama, backend="aot_eager")
    case.check(tokens(1, LENGTH), position_ids=positions(150, 42))
    case.check(tokens(1, LENGTH, seed=2), position_ids=positions(20, 130, 1, 41))
    assert case.graphs == 1


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_windows_soft_caps_and_sinks(kind, tokens):
    """Attention layers of both kinds compile as one graph each; experts are transformers' own."""
    model = build(kind, **dict(VARIANTS)[kind])
    sparsify(model.train(), BUDGET, block=16, tile=16)
    ids, packed = tokens(1, LENGTH), positions(150, 42)
    if kind == "gemma2":
        case = Compiled(model, backend="aot_eager")
        case.check(ids, position_ids=packed)
        case.check(ids, position_ids=positions(20, 172))
        assert case.graphs == 1
        return
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.self_attn.compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        loss = model(ids, labels=ids, position_ids=packed, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_lengths_in_a_tensor(one_layer, tokens):
    case = Compiled(one_layer)
    for cut in (150, 20):
        cu = torch.tensor([0, cut, LENGTH], dtype=torch.int32)
        batch = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
        case.check(tokens(1, LENGTH), position_ids=positions(cut, LENGTH - cut), **batch)
    assert case.graphs == 1
    batch = {"cu_seq_lens_q": (0, 20, LENGTH), "cu_seq_lens_k": (0, 20, LENGTH)}
    case.check(tokens(1, LENGTH), position_ids=positions(20, LENGTH - 20), **batch)


def test_padding(one_layer, tokens):
    case = Compiled(one_layer, backend="aot_eager")
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    case.check(tokens(2, LENGTH), attention_mask=mask)
    mask[0, 140:] = 0
    case.check(tokens(2, LENGTH), attention_mask=mask)
    mask[1, :40] = 0
    case.check(tokens(2, LENGTH), attention_mask=mask)
    assert case.graphs == 1


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_models(tiny, tokens, kind):
    model = sparsify(tiny(kind, num_hidden_layers=1).train(), BUDGET, block=16, tile=16)
    Compiled(model).check(tokens(1, LENGTH))


def test_the_law_at_the_moment(llama, tokens):
    """Dense or sparse or under another law, as in eager mode; a toggle back compiles nothing."""
    case, ids = Compiled(llama), tokens(1, LENGTH)
    losses = []
    for dense in (False, True, False, True):
        set_dense(llama, dense)
        case.check(ids)
        losses.append(llama(ids, labels=ids).loss.item())
    assert losses[0] != losses[1]
    assert case.graphs == 2
    set_dense(llama, False)
    sparsify(llama, Budget.fixed(128, sink=16), layers={1: Budget.dense()}, block=32)
    case.check(ids)
    assert case.graphs == 3
    for budget in (Budget.fixed(32, sink=16), None):
        set_budget(llama, budget)
        case.check(ids)
    assert case.graphs == 4


def test_dense_forward_only(one_layer, tokens):
    """A backward outside the switch is that of the forward."""
    case, ids = Compiled(one_layer), tokens(1, LENGTH)
    results = []
    for run in (one_layer, case.compiled):
        one_layer.zero_grad()
        set_dense(one_layer, True)
        loss = run(ids, labels=ids, use_cache=False).loss
        set_dense(one_layer, False)
        loss.backward()
        results.append([p.grad.clone() for p in one_layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference(one_layer, tokens):
    case, ids, packed = Compiled(one_layer.eval()), tokens(1, LENGTH), positions(100, 92)
    with torch.inference_mode():
        expected = one_layer(ids, position_ids=packed).logits
        assert torch.equal(case.compiled(ids, position_ids=packed).logits, expected)


def test_autocast(one_layer, tokens):
    case = Compiled(one_layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.check(tokens(1, LENGTH), position_ids=positions(150, 42))


def test_reference_backend(tiny, tokens):
    model = sparsify(
        tiny(num_hidden_layers=1).train(), BUDGET, block=16, tile=16, backend="reference"
    )
    Compiled(model).check(tokens(1, LENGTH), position_ids=positions(150, 42))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(llama, tokens, monkeypatch, reentrant):
    """Observers see a layer once and documents are found once, though layers run twice."""
    found = []
    real = documents.find_documents
    monkeypatch.setattr(
        documents, "find_documents", lambda *a, **k: found.append(a) or real(*a, **k)
    )
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    case = Compiled(llama, "eager" if reentrant else "aot_eager")
    ids, packed = tokens(1, LENGTH), positions(150, 42)
    case.check(ids, position_ids=packed)
    assert len(found) == 2
    seen = []
    with observe(llama, lambda layer, *_: seen.append(layer)):
        case.train_step(True, ids, position_ids=packed)
    assert seen == [0, 1]


def test_observers(llama, tokens):
    """They come and go without a new graph, and see what eager mode shows them."""
    case, ids, packed = Compiled(llama), tokens(1, LENGTH), positions(150, 42)
    seen = {False: [], True: []}
    for _ in range(2):
        case.check(ids, position_ids=packed)
        for compiled, calls in seen.items():
            with observe(llama, lambda *call, calls=calls: calls.append(call), layers=[1]):
                case.train_step(compiled, ids, position_ids=packed)
    assert case.graphs == 1
    assert [call[0] for call in seen[True]] == [1, 1]
    for eager, compiled in zip(*seen.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(eager[1:6], compiled[1:6], strict=True))
        assert eager[6].density == compiled[6].density
        assert eager[7] == compiled[7]
        assert eager[8].cu_seqlens == compiled[8].cu_seqlens == (0, 150, LENGTH)


def test_one_graph_for_all_layers(tiny, tokens):
    """Layers compiled one by one: what tells them apart is no constant of their graphs."""
    model = sparsify(tiny(num_hidden_layers=12).train(), BUDGET, block=16, tile=16)
    ids, packed = tokens(1, LENGTH), positions(150, 42)
    with torch.no_grad():
        expected = model(ids, position_ids=packed, use_cache=False).logits
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        assert torch.equal(model(ids, position_ids=packed, use_cache=False).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_errors_are_those_of_eager_mode(one_layer, tokens):
    compiled, mask = Compiled(one_layer).compiled, torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :30] = 0
    with pytest.raises(ValueError, match="start again between two real tokens"):
        compiled(
            tokens(2, LENGTH), attention_mask=mask, position_ids=positions(100, 92).expand(2, -1)
        )


@pytest.mark.slow
def test_inductor(llama, tokens):
    case, ids = Compiled(llama, backend="inductor"), tokens(1, LENGTH)
    for packed in (positions(150, 42), positions(20, 172)):
        eager, compiled = (case.train_step(c, ids, position_ids=packed) for c in (False, True))
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert case.graphs == 1
