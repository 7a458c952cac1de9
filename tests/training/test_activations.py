"""What a model keeps for its backward: gradients stay, memory falls."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from lit_sparse import unsparsify
from lit_sparse.training import activations
from lit_sparse.training.activations import set_activations


@pytest.fixture
def offloaded(monkeypatch):
    """The tensors that torch's offload gets to keep."""
    kept = []

    class Recording(save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (kept.append(tensor), pack(tensor))[1]

    monkeypatch.setattr(activations, "save_on_cpu", Recording)
    return kept


@pytest.mark.parametrize("kind", ["recompute", "offload"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_stay(tiny, row, train, assert_same, kind, architecture):
    model = tiny(architecture)
    plain = train(model, row)
    set_activations(model, kind)
    assert_same(train(model, row), plain)


def test_only_the_inputs_of_layers_are_kept_and_the_offload_gets_them(
    tiny, row, train_and_save, assert_same, offloaded
):
    model, inputs, saved, results = tiny(), [], {}, {}
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for kind in ("keep", "recompute", "offload"):
        assert not offloaded
        set_activations(model, kind)
        results[kind], saved[kind] = train_and_save(model, row)
    assert len(offloaded) == 2
    assert all(torch.equal(a, b) for a, b in zip(offloaded, inputs[-2:], strict=True))
    assert_same(results["offload"], results["keep"])

    # What recomputation keeps is the inputs of the layers and what is outside of them.
    inputs_of_layers = sum(tensor.untyped_storage().nbytes() for tensor in offloaded)
    assert saved["recompute"] == saved["offload"] + inputs_of_layers
    assert saved["keep"] > 4 * saved["recompute"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_falls(tiny, row):
    ids, positions = row["input_ids"].cuda(), row["position_ids"].cuda()
    held, gradients = {}, {}
    for kind in ("keep", "recompute", "offload"):
        model = unsparsify(tiny()).cuda()
        set_activations(model, kind)
        before = torch.cuda.memory_allocated()
        hidden = model.base_model(ids, position_ids=positions, use_cache=False).last_hidden_state
        held[kind] = torch.cuda.memory_allocated() - before
        hidden.square().sum().backward()
        gradients[kind] = model.model.embed_tokens.weight.grad
    assert held["keep"] > held["recompute"] > held["offload"]
    for kind in ("recompute", "offload"):
        torch.testing.assert_close(gradients[kind], gradients["keep"])


def test_an_unknown_kind_is_named(tiny):
    with pytest.raises(ValueError, match=r"activations must be one of keep, recompute, offload, g"):
        set_activations(tiny(), "drop")
