"""What a model keeps for its backward: gradients stay, memory falls."""

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

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


def _saved_on_device(model, row, train):
    """The tensors that autograd keeps where they are, weights apart, and what `train` gives."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # holds the storage: no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = train(model, row)
    return list(kept.values()), result


def _bytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("kind", ["recompute", "offload"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_stay(tiny, row, train, assert_same, kind, architecture):
    model = tiny(architecture)
    plain = train(model, row)
    set_activations(model, kind)
    assert_same(train(model, row), plain)


def test_only_the_inputs_of_layers_are_kept_and_the_offload_gets_them(
    tiny, row, train, assert_same, offloaded
):
    kept, results = {}, {}
    for kind in ("keep", "recompute", "offload"):
        model, inputs = tiny(), []
        set_activations(model, kind)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        kept[kind], results[kind] = _saved_on_device(model, row, train)
        if kind != "offload":
            assert not offloaded
    assert len(offloaded) == len(inputs) == 2
    assert all(torch.equal(a, b) for a, b in zip(offloaded, inputs, strict=True))
    assert_same(results["offload"], results["keep"])

    # What recomputation keeps is the inputs of the layers and what is outside of them.
    here = _bytes(kept["offload"])
    assert _bytes(kept["recompute"]) == here + _bytes(offloaded)
    assert _bytes(kept["keep"]) > 4 * _bytes(kept["recompute"])


def test_an_unknown_kind_is_named(tiny):
    with pytest.raises(ValueError, match=r"activations must be one of keep, recompute, offload, g"):
        set_activations(tiny(), "drop")
