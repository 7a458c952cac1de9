"""Leaves a Hugging Face directory behind when training ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lit_sparse.callbacks.common import datamodule_of, transformers_models
from lit_sparse.distributed.weights import whole_shape, whole_tensor
from lit_sparse.models import named_models
from lit_sparse.models.card import Training
from lit_sparse.models.export import check_replaceable, stored_tensors, write_model
from lit_sparse.training.curriculum import find_curriculum

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HuggingFaceExport(Callback):
    """Save model (safetensors, with the law and the last stage's RoPE in its config), tokenizer,
    generation config and a model card of law, stages and the last measured gap.

    The directory loads in plain transformers as an ordinary dense model;
    `lit_sparse.sparsify(model)` makes it the sparse one again. Weights that the strategy has
    sharded (ZeRO 3) are gathered one by one and written file by file: rank 0 never has the whole
    model. A module of several models gets a folder for each, by the name of its attribute.

    Args:
        directory: where to; relative to the trainer's log directory. A model that is there is
            replaced, but a README.md that you wrote or changed stays.
    """

    def __init__(self, directory: str = "huggingface") -> None:
        self.directory = directory
        self._written = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = False
        for _, place in self._places(trainer, pl_module):
            try:
                check_replaceable(place)
            except ValueError as error:
                raise ValueError(f"HuggingFaceExport.directory: {error}") from None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The strategy still holds the shards: it is torn down before on_fit_end.
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._written:  # a run that was complete when it was resumed
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for model, place in self._places(trainer, pl_module):
            _write(trainer, model, place, _training(trainer, pl_module, model))
            rank_zero_info(f"Hugging Face directory: {place}")
        self._written = True

    def _places(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[tuple[PreTrainedModel, Path]]:
        target = Path(trainer.log_dir or trainer.default_root_dir) / self.directory
        if len(models := transformers_models(pl_module)) == 1:
            return [(models[0], target)]
        return [(model, target / path) for path, model in named_models(pl_module).items()]


def _training(trainer: Trainer, pl_module: LightningModule, model: PreTrainedModel) -> Training:
    curriculum = find_curriculum(trainer)
    return Training(
        steps=trainer.global_step,
        pretrained=pl_module.hparams.get("pretrained") or model.config.name_or_path or None,
        stages=[asdict(stage) for stage in curriculum.stages] if curriculum else [],
        measured={name: float(value) for name, value in trainer.callback_metrics.items()},
    )


def _write(trainer: Trainer, model: PreTrainedModel, directory: Path, training: Training) -> None:
    writes = trainer.is_global_zero
    tensors = stored_tensors(model)
    weights = {
        name: torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }

    def on_disk(action: Callable[[], None]) -> None:
        failure: Exception | None = None
        if writes:
            try:
                action()
            except Exception as error:
                failure = error
        told = trainer.strategy.broadcast(str(failure) if failure else None)
        if told is not None:
            raise OSError(
                f"HuggingFaceExport could not write {directory}: {told}. lit-sparse export makes "
                "the directory from a checkpoint"
            ) from failure

    write_model(
        model,
        directory,
        weights,
        lambda name: whole_tensor(tensors[name], writes),
        tokenizer=getattr(datamodule_of(trainer), "text_tokenizer", None),
        training=training,
        on_disk=on_disk,
    )
