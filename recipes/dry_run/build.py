"""Builds every part of a run without a weight, a GPU or a file, as the command line would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch.optim import Optimizer

from lit_sparse.callbacks import ContextCurriculum, SparseAttention
from lit_sparse.models import (
    architecture_of,
    check_source,
    extend_context,
    pretrained_config,
    rope_parameters,
)
from lit_sparse.recipes.dry_run.data import read_data
from lit_sparse.recipes.estimate.memory import Memory
from lit_sparse.recipes.estimate.settings import QuietCLI, settings_of
from lit_sparse.recipes.estimate.sharding import Sharding
from lit_sparse.recipes.estimate.sizing import Sizing
from lit_sparse.training.adapters import frozen_dtype
from lit_sparse.training.checkpoint import check_architecture
from lit_sparse.training.tiled import refuse_tiling


class Build(QuietCLI):
    """A run that will not start. `model` is on the meta device, and `trainer` that of one process
    on a CPU: what the config says of accelerator, devices and strategy is in `settings`, and
    checked, without them.

    Args:
        argv: of `lit-sparse`, from "fit" on.

    Raises:
        ValueError, NotImplementedError: what fit would refuse, as far as that shows without
            reading weights and packing data.
    """

    def __init__(self, argv: list[str]) -> None:
        self.unchecked: list[str] = []
        """What only the machine that trains can tell."""
        super().__init__(argv)
        self.ropes: list[dict[str, Any]] = []
        """RoPE of each stage, in the names of transformers."""
        self._attach_callbacks()
        self._check_plain()
        if self.asked.ckpt_path:
            models = {"model": self.model.model_config}
            check_architecture(Path(self.asked.ckpt_path), models)
        self.data = read_data(self.datamodule, self.settings)
        if self.data.tokenizer is not None:
            self.trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
            self.model.setup("fit")  # compares vocabularies
        self.optimizer, self.peaks = self._configure_optimizers()

    # -- the parts, as the command line makes them --

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config["fit"]
        self.settings = settings_of(config)
        self.asked = config.clone()
        """The config as it is given; that of the parts differs where they need a GPU or weights."""
        model, strategy = config.model, config.trainer.strategy
        if model.pretrained is not None:
            check_source(model.pretrained, model.architecture, model.trust_remote_code)
            found = pretrained_config(model.pretrained, model.trust_remote_code)
            model.pretrained, model.architecture = None, architecture_of(found)
        if not torch.cuda.is_available():
            if model.liger_kernels:
                model.liger_kernels = False
                self.unchecked.append("model.liger_kernels needs a GPU to be tried")
            if model.loss == "liger":
                model.loss = "chunked"
                self.unchecked.append("model.loss: liger needs a GPU to be tried")
        for key in ("offload_optimizer", "offload_parameters"):
            options = getattr(strategy, "init_args", {})
            if options.get(key) == "nvme":
                options[key], options["nvme_path"] = "cpu", None
                self.unchecked.append(f"trainer.strategy.{key}: nvme needs the device to be tried")

    def instantiate_classes(self) -> None:
        with torch.device("meta"):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        alone = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
        return super().instantiate_trainer(**{**kwargs, **alone})

    # -- what a fit does before its first step --

    def _attach_callbacks(self) -> None:
        """Make the model sparse, and give it the RoPE of each stage in turn."""
        self.model.trainer = self.trainer
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (SparseAttention, ContextCurriculum)):
                callback.setup(self.trainer, self.model, "fit")
                callback.on_fit_start(self.trainer, self.model)
        stages = [(stage.length, stage.rope) for stage in self.settings.curriculum.stages]
        for i in range(len(stages)):
            extend_context(self.model.model, stages[: i + 1])
            self.ropes.append(dict(rope_parameters(self.model.model)))

    def _check_plain(self) -> None:
        """What only DeepSpeed can train."""
        settings, sharding = self.settings, self.sharding
        if sharding.stage is not None:
            return
        if settings.model.lora is not None:
            frozen_dtype(self.trainer.strategy)
        tiled = {
            "model.tiled_mlp": settings.tiled_mlp is not None,
            "model.loss: tiled": settings.loss == "tiled",
        }
        for key, asked in tiled.items():
            if asked:
                refuse_tiling(key, sharding.gpus, str(self.asked.trainer.strategy))

    def _configure_optimizers(self) -> tuple[Optimizer, list[float]]:
        """The optimizer, and the largest learning rate of each stage."""
        curriculum = self.settings.curriculum
        self.datamodule.adjust(self.trainer, self.data_ranks)
        made: Any = self.model.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        (share, *_), first, peaks = schedule.lr_lambdas, 0, []
        for end in curriculum.ends:
            peaks.append(self.model.hparams["learning_rate"] * max(map(share, range(first, end))))
            first = end
        return optimizer, peaks

    # -- how it will run --

    @property
    def sharding(self) -> Sharding:
        """Of the config; one process of plain PyTorch where it leaves that open."""
        return self.settings.own or Sharding(1, None)

    @property
    def data_ranks(self) -> int:
        return self.sharding.gpus // self.sharding.sequence

    def memory(self) -> Memory:
        """Of one GPU."""
        return Sizing(self.settings).memory(self.sharding)
