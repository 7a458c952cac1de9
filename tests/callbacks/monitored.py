"""A small module to watch, and trainers for it."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule, Trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_sparse import Budget
from lit_sparse.callbacks import DenseGapMonitor, SparseAttention

BUDGET = Budget(alpha=1, exponent=0.5, floor=80, sink=8, local=0.25)
ARCHITECTURE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    # Logits so flat as a new model's would hide what selection drops.
    "initializer_range": 0.3,
}


class Module(LightningModule):
    """Uses decoder and head of its model apart, with dropout between them."""

    def __init__(self, dropout=0.0, checkpointing=False, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(LlamaConfig(**ARCHITECTURE | changes))
        self.dropout = torch.nn.Dropout(dropout)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(self, batch):
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids")}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        logits = self.model.lm_head(self.dropout(hidden))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(count, lengths=(160, 1, 91), seed=1):
    """Rows of packed documents."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    rows = [
        {
            "input_ids": torch.randint(257, positions.shape, generator=generator),
            "position_ids": positions,
        }
        for _ in range(count)
    ]
    return torch.utils.data.DataLoader(rows, batch_size=None)


def sparse():
    return SparseAttention(BUDGET, block=16, tile=16)


def make_trainer(callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**settings | options)


class Recorder(DenseGapMonitor):
    """Keeps its samples."""

    def __init__(self, **options):
        super().__init__(**options)
        self.samples = []

    def finish(self, trainer, pl_module, sample):
        super().finish(trainer, pl_module, sample)
        self.samples.append(sample)


def gap_metrics(trainer):
    """What the monitor logged."""
    logged = trainer.callback_metrics.items()
    return {name: float(value) for name, value in logged if name.startswith("gap")}
