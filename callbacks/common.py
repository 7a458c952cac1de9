"""What several callbacks need: the models inside a module, and figures and texts for the logger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lit_sparse.models import find_models, is_sparse

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel


def transformers_models(pl_module: LightningModule) -> list[PreTrainedModel]:
    """The transformers models that a LightningModule holds; ValueError if it holds none."""
    models = find_models(pl_module)
    if not models:
        raise ValueError(
            f"{type(pl_module).__name__} holds no transformers model: assign one to an attribute "
            "in __init__ or configure_model, e.g. "
            "self.model = AutoModelForCausalLM.from_pretrained(DIR)"
        )
    return models


def sparse_models(pl_module: LightningModule) -> list[PreTrainedModel]:
    """Those of them that run sparse attention; ValueError if none does."""
    models = [model for model in find_models(pl_module) if is_sparse(model)]
    if not models:
        raise ValueError(
            f"no model in {type(pl_module).__name__} is sparse: add "
            "SparseAttention(Budget(...)) to the "
            "trainer's callbacks, or call lit_sparse.sparsify(model, budget)"
        )
    return models


def datamodule_of(trainer: Trainer) -> Any:
    """The trainer's data module, or None: without one Lightning leaves the attribute out."""
    return getattr(trainer, "datamodule", None)


def add_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Show a figure in every logger that can (TensorBoard)."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if trainer.is_global_zero and hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, trainer.global_step, close=False)


def add_text(trainer: Trainer, name: str, text: str) -> None:
    """Show a Markdown text in every logger that can (TensorBoard)."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if trainer.is_global_zero and hasattr(experiment, "add_text"):
            experiment.add_text(name, text, trainer.global_step)


def add_histogram(trainer: Trainer, name: str, values: Tensor) -> None:
    """Show the distribution of values, NaN left out, in every logger that can (TensorBoard)."""
    known = values.detach().flatten()
    known = known[~torch.isnan(known)]
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if trainer.is_global_zero and len(known) and hasattr(experiment, "add_histogram"):
            experiment.add_histogram(name, known, trainer.global_step)
