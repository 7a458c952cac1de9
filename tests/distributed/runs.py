"""What the cases of monitors.py share: data, modules, trainers, and what callbacks keep."""

from __future__ import annotations

from typing import Any

import torch
from parity import ARCHITECTURE, ATTENTION, BUDGET, Rows, rows
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader

from lit_sparse.callbacks import DenseGapMonitor, LongContextEval, SparseAttention
from lit_sparse.distributed import DeepSpeedSparseStrategy, ranks_of
from lit_sparse.distributed.gradients import engine_of
from lit_sparse.training import SparseLM

ROWS = 8
"""Sampled rows of all ranks."""
COMMON = {"every_n_steps": 1, "rows": ROWS, "min_context": 16}


class Data(Rows):
    """With four rows to validate on, of which each data-parallel rank takes its share."""

    labels = True

    def val_dataloader(self):
        ranks, found = ranks_of(self.trainer), rows(4, seed=7)
        share = len(found) // ranks.data_size
        own = found[ranks.data_rank * share : (ranks.data_rank + 1) * share]
        for row in own if not self.labels else []:
            del row["labels"]
        return DataLoader(own, batch_size=None)


class Recorder(DenseGapMonitor):
    """Keeps what it measured."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.samples: list[Any] = []
        self.gaps: list[Any] = []

    def finish(self, trainer, pl_module, sample):
        super().finish(trainer, pl_module, sample)
        self.samples.append(sample)

    def _judge(self, trainer, pl_module, gap):
        super()._judge(trainer, pl_module, gap)
        self.gaps.append(gap)


class Logged(Callback):
    """Keeps what each optimizer step logged, and the last validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, pl_module):
        self.last = {k: float(v) for k, v in trainer.callback_metrics.items()}


def make_trainer(size: str, stage: str, callbacks: list[Callback], **options: Any) -> Trainer:
    """Of a rank: two rows a step, of two data-parallel ranks or accumulated."""
    data_size, sequence_size = map(int, size.split("x"))
    strategy: Any = "auto"
    if size != "1x1":
        offload = "cpu" if stage.endswith("offload") else None
        strategy = DeepSpeedSparseStrategy(int(stage[0]), sequence_size, offload_optimizer=offload)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": data_size * sequence_size,
        "strategy": strategy,
        "accumulate_grad_batches": 2 // data_size,
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [SparseAttention(BUDGET, **ATTENTION), *callbacks],
    }
    return Trainer(**settings | options)


def make_module(kind: type[SparseLM] = SparseLM, **options: Any) -> SparseLM:
    torch.manual_seed(0)
    return kind(**{"architecture": ARCHITECTURE, "warmup_steps": 0, **options})


def weights(trainer: Trainer, module: SparseLM) -> torch.Tensor:
    """All weights; asks all ranks where they are sharded."""
    engine = engine_of(trainer)
    parameters = list(module.parameters())
    if engine is not None and engine.zero_optimization():
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = [safe_get_full_fp32_param(p) for p in parameters]
    return torch.cat([p.detach().flatten().clone() for p in parameters])


class Passkeys(LongContextEval):
    """Keeps each first choice of the model."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chosen: list[list[int]] = []

    def on_validation_epoch_end(self, trainer, pl_module):
        def keep(_, args, logits):
            self.chosen.append(logits.argmax(-1).flatten().tolist())

        hook = pl_module.model.lm_head.register_forward_hook(keep)
        super().on_validation_epoch_end(trainer, pl_module)
        hook.remove()


class PaddedData(Rows):
    """Of two rows to validate on the second is nearly empty."""

    def val_dataloader(self):
        ranks, found = ranks_of(self.trainer), []
        for row, length in zip(rows(2, seed=7), (250, 40), strict=True):
            mask = (torch.arange(256) < length).long()[None]
            found.append({"input_ids": row["input_ids"], "attention_mask": mask})
        return DataLoader(found[ranks.data_rank :: ranks.data_size], batch_size=None)
