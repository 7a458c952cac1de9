import copy

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy

from lit_sparse import Budget
from lit_sparse.callbacks import SparseAttention
from lit_sparse.data import PackedTextDataModule
from lit_sparse.models import build_model
from lit_sparse.training import Curriculum, SparseLM, Stage


def _fit(module, data, **options):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "limit_val_batches": 0,
        **options,
    }
    trainer = Trainer(**settings)
    trainer.fit(module, datamodule=data)
    return trainer


def _data(corpus, steps, **options):
    curriculum = Curriculum([Stage(128, steps)])
    return PackedTextDataModule(
        path=str(corpus), row_tokens=512, curriculum=curriculum, validation_rows=1, **options
    )


def test_a_store_without_rows_has_no_validation_loss(architecture, corpus, tmp_path):
    (tmp_path / "other").mkdir()
    for i in range(4):
        (tmp_path / "other" / f"{i}.txt").write_text("other " * 200)
    stages = [Stage(128, 1, mixture={str(corpus): 1.0})]
    data = PackedTextDataModule(
        path={str(corpus): 1.0, str(tmp_path / "other"): 1.0},
        row_tokens=512,
        curriculum=Curriculum(stages),
        validation_rows=1,
        validation_fraction=0.3,
    )
    trainer = _fit(SparseLM(architecture=architecture), data, limit_val_batches=1.0)
    shown = trainer.callback_metrics
    assert shown["val_by_store/corpus"] == shown["val/loss"] > 0
    assert "val_by_store/other" not in shown


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(architecture, corpus):
    """One step of two rows moves the weights as the mean over both rows' tokens would."""
    torch.manual_seed(0)
    module = SparseLM(architecture=architecture, warmup_steps=0, learning_rate=1e-3)
    start = copy.deepcopy(module.model)
    data = _data(corpus, steps=1, rows_per_step=2)
    gradients = {}

    class Keep(SparseLM):
        def on_before_optimizer_step(self, optimizer):
            gradients.update({n: p.grad.clone() for n, p in self.model.named_parameters()})

    module.__class__ = Keep
    _fit(module, data)

    data.trainer = None  # else the loader starts where the trainer stands
    rows = list(data.train_dataloader())
    total, tokens = 0.0, 0
    for row in rows:
        logits = start(row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0], row["labels"][0], reduction="sum"
        )
        tokens += int((row["labels"] != -100).sum())
    assert tokens == int(rows[0]["step_tokens"])
    (total / tokens).backward()
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_memory_features_change_no_gradient(architecture, corpus):
    """Sparse, over packed documents and two micro-batches a step, all features at once."""
    pytest.importorskip("deepspeed")
    features = {"activations": "offload", "tiled_mlp": 3, "loss": "tiled", "loss_chunk": 200}

    def gradients(**options):
        found = []

        class Keep(SparseLM):
            def on_before_optimizer_step(self, optimizer):
                found.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
                super().on_before_optimizer_step(optimizer)

        torch.manual_seed(0)
        module = Keep(architecture=architecture, warmup_steps=0, learning_rate=1e-6, **options)
        law = Budget.fixed(64, sink=16, local=0.25)
        sparse = SparseAttention(law, block=16, tile=16)
        data = _data(corpus, steps=2, rows_per_step=2)
        _fit(module, data, callbacks=[sparse], limit_val_batches=1.0)
        return found

    for ours, plain in zip(gradients(**features), gradients(), strict=True):
        for name, gradient in plain.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_step_without_loss_tokens_leaves_the_weights_alone(architecture, corpus):
    module = SparseLM(architecture=architecture, warmup_steps=0, learning_rate=1e-2)
    weights = []

    class Emptied(PackedTextDataModule):
        def train_dataloader(self):
            rows = list(super().train_dataloader())
            rows[1]["labels"].fill_(-100)
            rows[1]["step_tokens"] = torch.tensor(0)
            return torch.utils.data.DataLoader(rows, batch_size=None)

    class Keep(SparseLM):
        def on_train_batch_end(self, *_):
            weights.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    module.__class__ = Keep
    data = _data(corpus, steps=3)
    data.__class__ = Emptied
    _fit(module, data)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_learning_rate_warms_up_and_falls_to_its_minimum(architecture):
    module = SparseLM(architecture=architecture, warmup_steps=4, min_learning_rate=0.1)
    shares = [module._learning_rate_share(step, 20) for step in range(21)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[20] == pytest.approx(0.1)
    assert shares[3:] == sorted(shares[3:], reverse=True)


def test_vectors_and_embeddings_do_not_decay(architecture, corpus):
    module = SparseLM(architecture=architecture, weight_decay=0.5)
    trainer = _fit(module, _data(corpus, steps=1))
    decay, keep = trainer.optimizers[0].param_groups
    names = {id(p): name for name, p in module.named_parameters()}
    assert decay["weight_decay"] == 0.5
    assert keep["weight_decay"] == 0
    kept = {names[id(p)] for p in keep["params"]}
    assert "model.model.embed_tokens.weight" in kept
    assert "model.model.norm.weight" in kept
    assert len(kept) + len(decay["params"]) == len(names)
    assert all("proj" in names[id(p)] or "lm_head" in names[id(p)] for p in decay["params"])


GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "eos_token_id": None,
}


def test_stacked_biases_do_not_decay():
    module = SparseLM(architecture=GPT_OSS)
    names = {id(p): name for name, p in module.named_parameters()}
    decay, keep = ({names[id(p)] for p in g["params"]} for g in module.adamw().param_groups)
    assert "model.model.layers.0.mlp.experts.gate_up_proj" in decay
    assert "model.model.layers.0.mlp.experts.gate_up_proj_bias" in keep


def test_a_loss_of_routers_is_refused():
    with pytest.raises(ValueError, match=r"would leave it out: set output_router_logits: false"):
        SparseLM(architecture={**GPT_OSS, "output_router_logits": True})


def test_validation_is_by_tokens_in_bits_per_byte(architecture, corpus):
    module = SparseLM(architecture=architecture)
    data = _data(corpus, steps=1, validation_fraction=0.3)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.validate(module, datamodule=data, verbose=False)
    rows = list(data.val_dataloader())
    with torch.no_grad():
        sums = [module.token_loss(row) for row in rows]
    loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(loss), rel=1e-5)
    bits = float(trainer.callback_metrics["val/bits_per_byte"])
    assert bits == pytest.approx(float(loss) / 0.6931472, rel=1e-5)


def test_a_pretrained_model_is_checked_at_once_and_built_when_asked(architecture, tmp_path):
    with pytest.raises(ValueError, match=r"model\.pretrained: there is no directory .*nothing"):
        SparseLM(pretrained=str(tmp_path / "nothing"))
    build_model(architecture=architecture).save_pretrained(tmp_path)
    module = SparseLM(pretrained=str(tmp_path), activations="recompute")
    assert module.model is None
    module.configure_model()
    model = module.model
    # In the mode for inference, that of from_pretrained, transformers keeps all activations.
    assert all(layer.training and layer.gradient_checkpointing for layer in model.model.layers)
    module.configure_model()
    assert module.model is model
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.pretrained: .* has no model\.safetensors"):
        SparseLM(pretrained=str(tmp_path))


def test_a_vocabulary_larger_than_the_embedding_is_refused(architecture, corpus):
    module = SparseLM(architecture={**architecture, "vocab_size": 200, "eos_token_id": None})
    with pytest.raises(ValueError, match=r"257 tokens but the model embeds 200: set model.arch"):
        _fit(module, _data(corpus, steps=1))


@pytest.mark.parametrize(
    "options", [{"learning_rate": 0}, {"warmup_steps": -1}, {"loss_chunk": 0}, {"weight_decay": -1}]
)
def test_bad_options_are_named(architecture, options):
    with pytest.raises(ValueError, match=f"model.{next(iter(options))} is out of its range"):
        SparseLM(architecture=architecture, **options)


def test_lightnings_own_deepspeed_strategy_is_refused(architecture):
    module = SparseLM(architecture=architecture)
    module._trainer = Trainer(
        accelerator="cpu", strategy=DeepSpeedStrategy(), logger=False, enable_checkpointing=False
    )
    with pytest.raises(ValueError, match=r"trainer.strategy: .* twice: set deepspeed_sparse"):
        module.on_fit_start()
