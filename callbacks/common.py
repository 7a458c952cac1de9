"""What several callbacks need: the models inside a module, and figures and texts for the logger."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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


def writers(trainer: Trainer, method: str) -> list[Any]:
    """What the loggers of the first rank write with, if it has a method (TensorBoard's have); none
    on other ranks, and none in a `fast_dev_run`, whose logger has every method and writes nothing.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    found = (getattr(logger, "experiment", None) for logger in trainer.loggers)
    return [writer for writer in found if hasattr(writer, method)]


def add_figure(trainer: Trainer, name: str, draw: Callable[[], Figure]) -> None:
    """Show a figure in every logger that can (TensorBoard); where none can it is not drawn."""
    if experiments := writers(trainer, "add_figure"):
        figure = draw()
        for experiment in experiments:
            experiment.add_figure(name, figure, trainer.global_step, close=False)


def add_text(trainer: Trainer, name: str, text: str) -> None:
    """Show a Markdown text in every logger that can (TensorBoard)."""
    for experiment in writers(trainer, "add_text"):
        experiment.add_text(name, text, trainer.global_step)


def add_histogram(trainer: Trainer, name: str, values: Tensor) -> None:
    """Show the distribution of values in every logger that can (TensorBoard), NaN and infinities
    left out.
    """
    known = values.detach().flatten()
    known = known[known.isfinite()]
    if len(known):
        for experiment in writers(trainer, "add_histogram"):
            experiment.add_histogram(name, known, trainer.global_step)
