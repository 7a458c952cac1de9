"""The Lightning user: a module of their own, and our callbacks beside it."""

import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent))
from monitored import make_trainer

from lit_sparse import Budget
from lit_sparse.callbacks import (
    CollapseMonitor,
    ContextCurriculum,
    DenseGapMonitor,
    SparseAttention,
    Throughput,
)
from lit_sparse.models import is_sparse, law_of, rope_parameters
from lit_sparse.training import Stage

BUDGET = Budget(alpha=1, exponent=0.5, floor=32, sink=8)


class TheirModule(LightningModule):
    def __init__(self, architecture):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(LlamaConfig(**architecture))

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _batches(count=6):
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(257, (2, 256), generator=generator)} for _ in range(count)]
    return torch.utils.data.DataLoader(rows, batch_size=None)


def _plugin():
    return SparseAttention(BUDGET, block=16, tile=16)


def test_a_module_of_ones_own_trains_and_logs(architecture, tmp_path):
    module = TheirModule(architecture)
    monitors = [CollapseMonitor(every_n_steps=2), DenseGapMonitor(every_n_steps=2)]
    trainer = make_trainer(
        [*monitors, Throughput(), _plugin()], logger=TensorBoardLogger(tmp_path, version="")
    )
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, _batches(), _batches(2))

    assert law_of(module.model).budget == BUDGET
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    expected = {
        "loss",
        "val_loss",
        "curriculum/budget",
        "curriculum/density",
        "gap/captured_mass",
        "gap/output_error",
        "gap/kl",
        "gap/loss_delta",
        "collapse/entropy_ratio",
        "collapse/max_weight",
        "collapse/rank_residual",
        "train/tokens_per_second",
    }
    assert expected <= set(tags["scalars"])
    assert {"gap/by_layer_and_head", "collapse/by_layer_and_head"} <= set(tags["images"])
    assert events.Scalars("curriculum/budget")[0].value == 32
    density = events.Scalars("curriculum/density")[0].value
    assert 0.2 < density < 0.9
    masses = [scalar.value for scalar in events.Scalars("gap/captured_mass")]
    # Steps 0, 1, 3 and 5; Lightning repeats the last value between measurements.
    assert len(set(masses)) == 4
    assert all(0 < mass < 1 for mass in masses)


def test_a_module_of_ones_own_goes_through_stages(architecture, tmp_path):
    module, first = TheirModule(architecture), Budget(alpha=2, exponent=0.5, floor=64, sink=8)
    stages = [Stage(256, 3, budget=first), Stage(1024, 3, rope={"rule": "linear"})]
    logger = TensorBoardLogger(tmp_path, version="")
    # A validation, at the end of each stage, leaves the stage's budget alone.
    trainer = make_trainer([ContextCurriculum(stages), _plugin()], logger=logger)
    trainer.fit(module, _batches(), _batches(1))
    assert law_of(module.model).budget == BUDGET
    assert rope_parameters(module.model)["factor"] == 2
    events = EventAccumulator(trainer.log_dir).Reload()
    assert [e.value for e in events.Scalars("curriculum/budget")] == [64, 64, 64, 32, 32, 32]
    assert [e.value for e in events.Scalars("curriculum/length")] == [256] * 3 + [1024] * 3


def test_monitors_do_not_change_training(architecture):
    weights = []
    for monitors in ([], [CollapseMonitor(every_n_steps=1), DenseGapMonitor(every_n_steps=1)]):
        module = TheirModule(architecture)
        make_trainer([*monitors, _plugin()]).fit(module, _batches(), _batches(1))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_a_budget_that_keeps_everything_trains_as_sdpa_does(architecture):
    weights = []
    for callbacks in ([], [SparseAttention(Budget.dense(), block=16)]):
        module = TheirModule(architecture)
        make_trainer(callbacks).fit(module, _batches(2))
        assert is_sparse(module.model) == bool(callbacks)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_half_precision_leaves_the_frequencies_of_rope_alone(architecture):
    module = TheirModule(architecture)
    before = module.model.model.rotary_emb.inv_freq.clone()
    trainer = make_trainer([SparseAttention(BUDGET)], max_steps=1, precision="bf16-true")
    trainer.fit(module, _batches())
    assert module.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(module.model.model.rotary_emb.inv_freq, before)


def test_validating_alone_is_sparse_too(architecture):
    module = TheirModule(architecture)
    make_trainer([_plugin()]).validate(module, _batches(1), verbose=False)
    assert is_sparse(module.model)


def test_a_module_without_a_transformers_model_is_refused():
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="Plain holds no transformers model"):
        make_trainer([_plugin()]).fit(Plain(), _batches(1))


def test_a_monitor_without_a_sparse_model_says_what_to_add(architecture):
    with pytest.raises(ValueError, match=r"add SparseAttention\(Budget"):
        make_trainer([DenseGapMonitor()]).fit(TheirModule(architecture), _batches(1))
