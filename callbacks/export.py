"""Leaves a Hugging Face directory behind when training ends; of adapters, a second one."""

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
from lit_sparse.models.export.card import Training
from lit_sparse.models.export.write import check_replaceable, stored_tensors, write_model
from lit_sparse.models.lora.adapters import adapted
from lit_sparse.models.lora.merge import check_adapter_replaceable, merged_weights, write_adapter
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

    Adapters (LoRA) are merged into the weights, and besides written alone, as
    `peft.PeftModel.from_pretrained` loads them.

    Args:
        directory: where to; relative to the trainer's log directory. A model that is there is
            replaced, but a README.md that you wrote or changed stays.
        adapter_directory: the same for adapters alone.
    """

    def __init__(self, directory: str = "huggingface", adapter_directory: str = "adapter") -> None:
        self.directory, self.adapter_directory = directory, adapter_directory
        self._written = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = False
        for model, place, adapter_place in self._places(trainer, pl_module):
            if adapted(model) is None and hasattr(model, "peft_config"):
                raise ValueError(
                    "HuggingFaceExport merges adapters of "
                    "lit_sparse.models.lora.adapters.add_lora, and this "
                    f"{type(model).__name__} has others: make them with add_lora, or leave "
                    "HuggingFaceExport out and save them by peft"
                )
            key = "directory"
            try:
                check_replaceable(place)
                key = "adapter_directory"
                if adapted(model) is not None:
                    check_adapter_replaceable(adapter_place)
            except ValueError as error:
                raise ValueError(f"HuggingFaceExport.{key}: {error}") from None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The strategy still holds the shards: it is torn down before on_fit_end.
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._written:  # a run that was complete when it was resumed
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for model, place, adapter_place in self._places(trainer, pl_module):
            _write(trainer, model, place, adapter_place, _training(trainer, pl_module, model))
            rank_zero_info(f"Hugging Face directory: {place}")
            if adapted(model) is not None:
                rank_zero_info(f"adapters alone: {adapter_place}")
        self._written = True

    def _places(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> list[tuple[PreTrainedModel, Path, Path]]:
        """Each model, and where to write it and its adapters."""
        run = Path(trainer.log_dir or trainer.default_root_dir)
        target, adapter = run / self.directory, run / self.adapter_directory
        if len(models := transformers_models(pl_module)) == 1:
            return [(models[0], target, adapter)]
        named = named_models(pl_module)
        return [(model, target / path, adapter / path) for path, model in named.items()]


def _training(trainer: Trainer, pl_module: LightningModule, model: PreTrainedModel) -> Training:
    curriculum, adapters = find_curriculum(trainer), adapted(model)
    return Training(
        steps=trainer.global_step,
        pretrained=pl_module.hparams.get("pretrained") or model.config.name_or_path or None,
        stages=[asdict(stage) for stage in curriculum.stages] if curriculum else [],
        measured={name: float(value) for name, value in trainer.callback_metrics.items()},
        lora=asdict(adapters.lora) if adapters else None,
    )


def _write(
    trainer: Trainer, model: PreTrainedModel, directory: Path, adapter: Path, training: Training
) -> None:
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

    def read(name: str) -> torch.Tensor | None:
        return whole_tensor(tensors[name], writes)

    write_model(
        model,
        directory,
        *merged_weights(model, weights, read),
        tokenizer=getattr(datamodule_of(trainer), "text_tokenizer", None),
        training=training,
        on_disk=on_disk,
    )
    if adapted(model) is not None:
        write_adapter(model, adapter, weights, read, on_disk=on_disk)
