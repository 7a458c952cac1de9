"""TensorBoard as a cockpit: one page of charts, the law with its stages, a row for the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from lit_sparse.budget import Budget
from lit_sparse.callbacks.collapse import CollapseMonitor
from lit_sparse.callbacks.common import add_figure, sparse_models, writers
from lit_sparse.callbacks.controller import BudgetController
from lit_sparse.callbacks.curriculum import ContextCurriculum
from lit_sparse.callbacks.dense_gap import DenseGapMonitor
from lit_sparse.callbacks.evaluation import LongContextEval
from lit_sparse.callbacks.law_figure import law_figure
from lit_sparse.callbacks.sparse_attention import SparseAttention
from lit_sparse.callbacks.throughput import Throughput
from lit_sparse.evaluation import LOSS
from lit_sparse.models import Law, alpha_factor, configured_law
from lit_sparse.training.curriculum import Stage, find_curriculum

METRICS = (
    "val/loss",
    "gap/kl",
    "gap/missed_mass",
    "gap/output_error",
    "train/loss",
    "train/tokens_per_second",
)
"""Logged metrics whose last values stand in a run's row under HPARAMS."""


class Cockpit(Callback):
    """Arrange TensorBoard. Logs no number of its own; every rank but the first does nothing.

    - CUSTOM SCALARS: loss, gap, collapse, curriculum and speed on one page, with bands from the 5th
      to the 95th percentile; charts of callbacks that the trainer does not have are left out.
    - IMAGES, `curriculum/law`: k(n) against n with the stages on it, drawn when training starts and
      again when the law changes other than by stages (`BudgetController`, `set_budget`).
    - HPARAMS: a row for a run that has finished, with law, curriculum and learning rate beside the
      last loss and gap. Rows of several runs under one folder are compared there. Lightning's
      logger takes that row for itself unless it has `default_hp_metric=False`, as in `lit-sparse
      fit`.

    A resumed run shows each of them once.
    """

    def __init__(self) -> None:
        self._arranged = False
        self._base: Budget | None = None
        self._drawn = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The logger of a fast_dev_run has every attribute, and all are true.
        if any(getattr(logger, "_default_hp_metric", False) is True for logger in trainer.loggers):
            rank_zero_warn(
                "Cockpit: give the TensorBoardLogger default_hp_metric=False; its hp_metric takes "
                "the place of the law and the gap under HPARAMS"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._arranged:
            for writer in writers(trainer, "add_custom_scalars"):
                writer.add_custom_scalars(layout(trainer))
            self._arranged = True
        plugin = _find(trainer, SparseAttention)
        # What holds where a stage has no budget: a stage that has one may be in force already.
        self._base = plugin.law.budget if plugin else configured_law(_model(pl_module)).budget

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model = _model(pl_module)
        law, factor = configured_law(model), alpha_factor(model)
        stages, base = _stages(trainer), self._base or law.budget
        known = [base, *(stage.budget for stage in stages)]
        key = {"law": None if law.budget in known else law.to_dict(), "factor": factor}
        if (text := json.dumps(key)) == self._drawn:
            return
        self._drawn = text
        shown = base if law.budget in known else law.budget
        draw = partial(
            law_figure,
            Law(shown, law.layers, law.block, law.tile, law.score),
            stages,
            max((stage.length for stage in stages), default=model.config.max_position_embeddings),
            factor=factor,
            groups=model.config.num_attention_heads // model.config.num_key_value_heads,
        )
        add_figure(trainer, "curriculum/law", draw)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer in writers(trainer, "add_custom_scalars"):
            for summary in _row(_hyperparameters(trainer, pl_module, self._base)):
                writer._get_file_writer().add_summary(summary)

    def state_dict(self) -> dict[str, Any]:
        return {"arranged": self._arranged, "drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._arranged, self._drawn = state_dict["arranged"], state_dict["drawn"]


def layout(trainer: Trainer) -> dict[str, dict[str, list[Any]]]:
    """The page for `SummaryWriter.add_custom_scalars`: category -> chart -> kind and tags (regular
    expressions for lines; value, lower and upper bound for a band).
    """
    staged = _find(trainer, ContextCurriculum)
    # The names of SparseLM, and those that a module of one's own is likely to use.
    loss = {
        "training loss (nats a token)": _lines("(train[/_])?loss"),
        "validation loss (nats a token)": _lines(
            "val/loss|val_by_length/.*" if staged else "val[/_]loss"
        ),
        "gradient norm": _lines("train/grad_norm"),
        "learning rate": _lines("(train/)?lr.*"),
    }
    page = {"Loss": loss}
    if asks := _find(trainer, LongContextEval):
        page["Long context"] = {
            "loss by position (nats a token)" if task == LOSS else f"{task} (share answered)": (
                _lines("loss_by_position/.*" if task == LOSS else f"{task}/.*")
            )
            for task in asks.tasks
        }
    if _find(trainer, DenseGapMonitor):
        page["Gap to dense attention"] = {
            "missed mass, p5 to p95": _band("gap/missed_mass"),
            "output error, p5 to p95": _band("gap/output_error"),
            "recall of the selection, p5 to p95": _band("gap/recall"),
            "KL to dense (nats a token)": _lines("gap/kl"),
            "loss - dense loss (nats a token)": _lines("gap/loss_delta"),
            "same most likely token": _lines("gap/top1_agreement"),
            "missed mass by context": _lines("gap_by_context/missed_mass_.*"),
            "KL to dense by context (nats a token)": _lines("gap_by_context/kl_.*"),
        }
    if _find(trainer, CollapseMonitor):
        page["Collapse"] = {
            "entropy / ln n, p5 to p95": _band("collapse/entropy_ratio", "collapse_spread"),
            "entropy / ln n by layer": _lines("collapse_by_layer/entropy_ratio_.*"),
            "largest weight": _lines("collapse/max_weight(_without_sink)?"),
            "largest logit (nats)": _lines("collapse/logit_max"),
            "gamma, of std and of entropy (collapse at 1)": _lines("collapse/gamma(_of_entropy)?"),
            "rank residual": _lines("collapse/rank_residual"),
            "gradients of query and key weights": _lines("collapse/(query|key)_grad_norm"),
        }
    page["Curriculum"] = {
        "length and k(n) (tokens)": _lines("curriculum/(length|budget)"),
        "density": _lines("curriculum/density"),
    }
    if staged:
        page["Curriculum"]["stage"] = _lines("curriculum/stage")
    if _find(trainer, BudgetController):
        page["Curriculum"] |= {
            "controller: missed mass and its target": _lines("controller/(missed_mass_p95|target)"),
            "controller: factor on alpha": _lines("controller/alpha_factor"),
        }
    if _find(trainer, Throughput):
        page["Speed"] = {
            "tokens per second": _lines("train/tokens_per_second"),
            "memory (GiB)": _lines("train/memory_gib"),
        }
    return page


def _lines(tags: str) -> list[Any]:
    return ["Multiline", [f"^({tags})$"]]


def _band(tag: str, area: str | None = None) -> list[Any]:
    edge = tag if area is None else f"{area}/{tag.partition('/')[2]}"
    return ["Margin", [tag, f"{edge}_p5", f"{edge}_p95"]]


def _hyperparameters(
    trainer: Trainer, pl_module: LightningModule, base: Budget | None
) -> dict[str, str | float]:
    model = _model(pl_module)
    budget = (base or configured_law(model).budget).scaled(alpha_factor(model))
    stages = _stages(trainer)
    # Five and the steps: the table shows five, by the alphabet, before it is told to show more.
    found: dict[str, str | float] = {
        "alpha": budget.alpha,
        "exponent": budget.exponent,
        "floor": budget.floor,
        "curriculum": f"{stages[0].length} to {stages[-1].length}" if stages else "none",
        "steps": trainer.global_step,
    }
    if trainer.optimizers:
        group = trainer.optimizers[0].param_groups[0]
        found["learning_rate"] = group.get("initial_lr", group["lr"])
    return found


def _row(hyperparameters: dict[str, str | float]) -> Iterator[Any]:
    """The three summaries of a finished session, as TensorBoard's HPARAMS page reads them."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                type="DATA_TYPE_STRING" if isinstance(value, str) else "DATA_TYPE_FLOAT64",
            )
            for name, value in hyperparameters.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name={"tag": tag}) for tag in METRICS],
    )
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in hyperparameters.items():
        kind = "string_value" if isinstance(value, str) else "number_value"
        setattr(start.hparams[name], kind, value)
    end = plugin_data_pb2.SessionEndInfo(status="STATUS_SUCCESS")
    for tag, content in (
        (metadata.EXPERIMENT_TAG, {"experiment": experiment}),
        (metadata.SESSION_START_INFO_TAG, {"session_start_info": start}),
        (metadata.SESSION_END_INFO_TAG, {"session_end_info": end}),
    ):
        data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
        summary = Summary(value=[Summary.Value(tag=tag)])
        plugin = summary.value[0].metadata.plugin_data
        plugin.plugin_name = metadata.PLUGIN_NAME
        # A map has no order: a continued run must write the same bytes.
        plugin.content = data.SerializeToString(deterministic=True)
        yield summary


def _find(trainer: Trainer, kind: type) -> Any:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _stages(trainer: Trainer) -> tuple[Stage, ...]:
    curriculum = find_curriculum(trainer)
    return () if curriculum is None else curriculum.stages


def _model(pl_module: LightningModule) -> Any:
    return sparse_models(pl_module)[0]
