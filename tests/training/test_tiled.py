"""DeepSpeed's tiled MLP: gradients stay, and what an MLP computes exists for one tile."""

import copy
import sys

import pytest
import torch
from pytorch_lightning import Trainer

from lit_sparse.training import SparseLM
from lit_sparse.training.activations import set_activations
from lit_sparse.training.tiled import tile_mlps

pytest.importorskip("deepspeed")


@pytest.mark.parametrize("tiles", [1, 3, 30])
def test_gradients_stay(tiny, row, train, assert_same, tiles):
    model = tiny()
    plain = train(model, row)
    tile_mlps(model, tiles)
    assert_same(train(model, row), plain)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_every_architecture_with_its_layers_recomputed(tiny, row, train, assert_same, architecture):
    model = tiny(architecture)
    plain = train(model, row)
    tile_mlps(model, 4)
    set_activations(model, "offload")
    assert_same(train(model, row), plain)


def test_a_tile_exists_at_a_time(tiny, row, train_and_save, rows_of, inner):
    model = tiny()
    with rows_of(inner) as whole:
        _, saved = train_and_save(model, row)
    tile_mlps(model, 4)
    with rows_of(inner) as tiled:
        _, saved_tiled = train_and_save(model, row)
    assert whole.rows == 221
    assert tiled.rows == 56
    # Of each MLP at least four float32 tensors [tokens, inner] are no longer kept.
    assert saved - saved_tiled >= 2 * 4 * 4 * 221 * inner


def test_rows_of_a_batch(tiny, train, assert_same):
    ids, labels = torch.randint(151, (2, 3, 40))
    batch = {"input_ids": ids, "position_ids": None, "labels": labels}
    model = tiny()
    plain = train(model, batch)
    tile_mlps(model, 7)
    assert_same(train(model, batch), plain)


@pytest.mark.parametrize("learns", ["layers.0.mlp", "embed_tokens"])
def test_parts_that_are_frozen(tiny, row, train, assert_same, learns):
    """An MLP learns though nothing before it does; a frozen one lets the gradient through."""
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns in name)
    plain = train(model, row)
    assert plain[1]
    tile_mlps(model, 3)
    assert_same(train(model, row), plain)


def test_under_autocast(tiny, row, train, assert_same):
    """The backward, which is outside of autocast, computes in the precision of the forward."""
    model = tiny()

    def loss(model, hidden, labels):
        return hidden.float().pow(2).sum()

    def autocast(model):
        base, forward = model.base_model, model.base_model.forward
        base.forward = torch.autocast("cpu", torch.bfloat16)(forward)
        result = train(model, row, loss)
        del base.forward
        return result

    model.lm_head.requires_grad_(False)
    plain = autocast(model)
    tile_mlps(model, 1)
    assert_same(autocast(model), plain)


def test_experts_are_refused(tiny):
    model = tiny("mixtral", num_local_experts=2)
    with pytest.raises(
        NotImplementedError,
        match=r"layers\.0\.mlp sends tokens to experts.*: set model.tiled_mlp: null",
    ):
        tile_mlps(model, 2)


def test_a_copy_is_of_its_own(tiny, row, train, assert_same):
    model = tiny()
    tile_mlps(model, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(train(other, row), train(tiny(), row))


@pytest.mark.parametrize(("tiles", "last"), [(3, 2), (50, 44), (1000, 220)])
def test_zero_waits_for_the_last_tile(tiny, row, train, tiles, last):
    """ZeRO reduces a gradient when it is told that it is whole; 221 tokens make 45 tiles of 5."""
    model = tiny()
    tile_mlps(model, tiles)
    ready = {}
    for name, parameter in model.model.layers[0].mlp.named_parameters():
        parameter.register_hook(
            lambda _, n=name, p=parameter: ready.setdefault(n, []).append(p.ds_grad_is_ready)
        )
    train(model, row)
    assert len(ready) == 3
    for told in ready.values():
        assert told == [False] * last + [True]


@pytest.mark.parametrize("options", [{"tiled_mlp": 2}, {"loss": "tiled"}])
def test_ranks_without_deepspeed_are_refused(architecture, options):
    module = SparseLM(architecture=architecture, **options)
    module._trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    key = next(iter(options))
    with pytest.raises(ValueError, match=rf"model.{key}.* trains on 2 processes under DeepSpeed"):
        module.on_fit_start()


@pytest.mark.parametrize("options", [{"tiled_mlp": 2}, {"loss": "tiled"}])
def test_without_deepspeed(architecture, monkeypatch, options):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.setitem(sys.modules, name, None)
    key = next(iter(options))
    with pytest.raises(ValueError, match=rf"model.{key}.* needs DeepSpeed: pip install"):
        SparseLM(architecture=architecture, **options)


@pytest.mark.parametrize("tiles", [0, True, 1.5])
def test_no_number_of_tiles(tiny, tiles):
    with pytest.raises(ValueError, match=r"model.tiled_mlp must be null or a number of tiles"):
        tile_mlps(tiny(), tiles)
