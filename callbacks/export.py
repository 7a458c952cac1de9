"""Leaves a Hugging Face directory behind when training ends."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lit_sparse.callbacks.common import datamodule_of, transformers_models


class HuggingFaceExport(Callback):
    """Save model (safetensors, with the law and the last stage's RoPE in its config) and tokenizer.

    The directory loads in plain transformers as an ordinary dense model;
    `lit_sparse.sparsify(model)` makes it the sparse one again.

    Args:
        directory: where to; relative to the trainer's log directory.
    """

    def __init__(self, directory: str = "huggingface") -> None:
        self.directory = directory

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # asks all ranks
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = Path(log_dir or trainer.default_root_dir) / self.directory
        models = transformers_models(pl_module)
        for i, model in enumerate(models):
            model.save_pretrained(target if len(models) == 1 else target / str(i))
        tokenizer = getattr(datamodule_of(trainer), "text_tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        rank_zero_info(f"Hugging Face directory: {target}")
