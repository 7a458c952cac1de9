"""Adapters beside frozen weights in training: gradients, precision, checkpoints."""

import pytest
import torch
from pytorch_lightning import Trainer

from lit_sparse import Budget
from lit_sparse.callbacks import (
    BudgetController,
    CollapseMonitor,
    FiniteGuard,
    RunCheckpoint,
    SparseAttention,
    StepSeed,
)
from lit_sparse.data import PackedTextDataModule
from lit_sparse.models import build_model
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.training import Curriculum, SparseLM, Stage
from lit_sparse.training.activations import set_activations
from lit_sparse.training.adapters import check_liger_head, check_tiled_dropout
from lit_sparse.training.loss import summed_loss
from lit_sparse.training.tiled import tile_mlps


def _add(model, **keys):
    """Adapters whose B is not 0, where A would get no gradient."""
    add_lora(model, LoRA(rank=3, **keys))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"targets": ["layers.1.mlp.up_proj"]},
        {"targets": "all-linear", "train_norms": True, "train_embeddings": True},
    ],
)
def test_memory_features_change_no_gradient(tiny, row, train, assert_same, keys):
    """All that trains gets one, though the embeddings, where the row comes in, may be frozen."""
    pytest.importorskip("deepspeed")
    model = _add(tiny("qwen3", tie_word_embeddings=True), **keys)
    plain = train(model, row)
    assert plain[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    tile_mlps(model, 3)
    set_activations(model, "offload")
    for kind in ("tiled", "chunked"):
        assert_same(
            train(model, row, lambda m, h, y, kind=kind: summed_loss(m, h, y, kind, 50)), plain
        )


def test_recomputed_layers_drop_the_same_inputs(tiny, row, train, assert_same):
    model = _add(tiny(), targets="all-linear", dropout=0.3).train()
    results = []
    for kind in ("keep", "recompute"):
        set_activations(model, kind)
        torch.manual_seed(4)
        results.append(train(model, row))
    assert_same(results[1], results[0])
    with pytest.raises(ValueError, match=r"model\.lora\.dropout with model\.tiled_mlp: the backw"):
        check_tiled_dropout(model, tiled_mlp=True, tiled_loss=True)
    check_tiled_dropout(model, tiled_mlp=False, tiled_loss=True)


def test_ligers_loss_takes_no_adapted_head(tiny):
    check_liger_head(add_lora(tiny(), LoRA(rank=2, targets="all-linear")))
    with pytest.raises(
        ValueError, match=r"model\.loss: liger .* model\.lora\.targets gives the hea"
    ):
        check_liger_head(add_lora(tiny(), LoRA(rank=2, targets=["q_proj", "lm_head"])))


# -- runs --


@pytest.fixture
def pretrained(architecture, tmp_path):
    torch.manual_seed(0)
    build_model(architecture={**architecture, "initializer_range": 0.1}).save_pretrained(
        tmp_path / "base"
    )
    return str(tmp_path / "base")


@pytest.fixture
def fit(corpus, tmp_path):
    """Trains a module for four steps of two rows, with a checkpoint after each."""

    def run(module, *callbacks, name="run", start=None, **options):
        data = PackedTextDataModule(
            path=str(corpus),
            row_tokens=256,
            rows_per_step=2,
            curriculum=Curriculum([Stage(128, 4)]),
            validation_rows=1,
        )
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=-1,
            limit_val_batches=0,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            default_root_dir=tmp_path / name,
            callbacks=[
                SparseAttention(Budget.fixed(64, sink=16, local=0.25), block=16, tile=16),
                StepSeed(1),
                RunCheckpoint(1, keep=9),
                *callbacks,
            ],
            **options,
        )
        trainer.fit(module, datamodule=data, ckpt_path=start)
        return trainer

    run.checkpoints = tmp_path / "run" / "checkpoints"
    return run


def _module(pretrained, lora=None, **options):
    lora = lora or LoRA(rank=4, dropout=0.1, train_norms=True)
    return SparseLM(pretrained, lora=lora, warmup_steps=0, learning_rate=1e-2, **options)


def _weights(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def test_a_run_trains_adapters_alone_and_goes_on_exactly(pretrained, fit):
    module = _module(pretrained)
    guards = FiniteGuard(), CollapseMonitor(every_n_steps=1), BudgetController()
    trainer = fit(module, *guards)
    assert trainer.callback_metrics["train/grad_norm"] > 0
    decay, keep = trainer.optimizers[0].param_groups
    names = {id(p): n for n, p in module.named_parameters()}
    assert all(".lora_" in names[id(p)] for p in decay["params"])
    assert all("norm" in names[id(p)] for p in keep["params"])
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == len(decay["params"]) + len(keep["params"])
    base = build_model(pretrained).state_dict()
    for name, weight in module.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in base:
            assert torch.equal(weight, base[plain]) == (f"model.{name}" not in trained), name

    file = fit.checkpoints / "step=2.ckpt"
    assert torch.load(file, weights_only=True)["state_dict"].keys() == trained
    again = _module(pretrained)
    fit(again, name="again", start=file)
    for name, weight in _weights(module).items():
        assert torch.equal(_weights(again)[name], weight), name
    loaded = SparseLM.load_from_checkpoint(fit.checkpoints / "step=4.ckpt", weights_only=True)
    for name, weight in _weights(module).items():
        assert torch.equal(_weights(loaded)[name], weight), name


def test_what_cannot_go_on_from_a_checkpoint_says_so(pretrained, fit, architecture):
    fit(_module(pretrained), max_steps=1)
    file = fit.checkpoints / "step=1.ckpt"

    def refused(message, module):
        with pytest.raises(ValueError, match=message):
            fit(module, name="other", start=file)

    other = _module(pretrained, LoRA(rank=2, train_norms=True))
    refused(r"others: it has model\.lora\.rank: 4, not model\.lora\.rank: 2", other)
    refused(r"model\.lora is not set, but the checkpoint holds adapters", SparseLM(pretrained))
    torch.manual_seed(1)
    build_model(architecture=architecture).save_pretrained(pretrained)
    refused(r"model\.pretrained: the weights in .* are not those", _module(pretrained))


def test_frozen_weights_are_bfloat16_and_adapters_float32_in_mixed_precision(pretrained, fit):
    module = _module(pretrained, LoRA(targets="all-linear", train_embeddings=True))
    fit(module, precision="bf16-mixed", max_steps=1)
    for name, weight in module.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name
    with pytest.raises(ValueError, match=r"trainer\.precision: bf16-true would train the adapters"):
        fit(_module(pretrained), precision="bf16-true")


def test_random_weights_are_not_adapted(architecture, fit):
    module = SparseLM(architecture=architecture, lora=LoRA())
    assert any(".lora_A." in name for name, _ in module.named_parameters())
    with pytest.raises(ValueError, match=r"model\.architecture are random: set model\.pretrained"):
        fit(module)


def test_a_step_without_loss_tokens_leaves_adapters_alone(pretrained, fit):
    class Emptied(SparseLM):
        def training_step(self, batch, batch_idx):
            if self.global_step == 1:
                batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
                batch["step_tokens"] = torch.tensor(0)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_):
            seen.append(self.model.get_input_embeddings().weight.detach().clone())

    seen = []
    module = Emptied(
        pretrained, lora=LoRA(train_embeddings=True), warmup_steps=0, learning_rate=1e-2
    )
    fit(module, max_steps=3)
    first, second, third = seen[1::2]
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
