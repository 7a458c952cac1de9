"""How far the sparse model is from itself run densely."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lit_sparse.callbacks.alerts import Alarm, Alert, Place
from lit_sparse.callbacks.common import add_histogram, sparse_models
from lit_sparse.callbacks.compare_schedule import CompareSchedule
from lit_sparse.callbacks.dense_comparison import DenseComparison, Gap
from lit_sparse.callbacks.sampled import Average, SampledAttentionMonitor, log2_bucket
from lit_sparse.callbacks.sampler import Sample
from lit_sparse.callbacks.signatures import GrowingGap, PersistentError, PersistentGap
from lit_sparse.models import budget_of, law_layers

_COMPARED = "gap/kl, gap/loss_delta and gap/top1_agreement"


class DenseGapMonitor(SampledAttentionMonitor):
    """Log what sparse attention loses against dense attention, exactly, and alert where the law is
    wrong.

    On sampled rows of training steps: `gap/missed_mass` (dense softmax mass of the dropped keys,
    tau = 1 - exp(lse_sparse - lse_dense)), `gap/captured_mass` (1 - tau), `gap/output_error`
    (relative, of a head's output) and `gap/recall` (mass of the chosen far blocks over that of the
    best ones), with their 5th and 95th percentiles over rows, heads and layers; by layer, by
    context (`gap_by_context/NAME_00512`: rows that see 512 to 1023 keys), as histograms
    (`gap_rows/`), and by head in a figure.

    On the first batches of a validation, which run a second time with dense attention: `gap/kl` (KL
    of the dense to the sparse next-token distribution, nats a token; also by context),
    `gap/loss_delta` (sparse - dense loss, nats a token) and `gap/top1_agreement`.

    Alerts, once a place (see callbacks/README.md): `persistent_error`, a layer whose output error
    stays at equal contexts although the budget grew, or a model whose KL does; and
    `gap_grows_with_length`, KL that grows with ln n over the documents of a validation.

    Args:
        every_n_steps, rows, min_context, seed, layers, heads: see `SampledAttentionMonitor`.
        validation_batches: batches of a validation that also run densely, on each rank; 0: none.
        compare_every: validations from one that compares to the next, or "auto": as many as 1 % of
            the training time allows. Stage ends and the last validation always compare.
        on_alert: see `Reaction` in `lit_sparse.callbacks.alerts`.
        patience: measurements under a budget that a layer's error is averaged over, at least 2.
        error_limit: relative output error below which no layer alerts.
        kl_limit: KL in nats a token below which no model alerts.

    Raises:
        ValueError: an option out of its range, a layer or head that the model does not have, or no
            sparse model; when fitting starts at the latest.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        rows: int = 64,
        min_context: int = 64,
        seed: int = 0,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        validation_batches: int = 2,
        compare_every: Literal["auto"] | int = "auto",
        on_alert: Literal["warn", "stop"] | Callable[[Trainer, Alert], None] = "warn",
        patience: int = 4,
        error_limit: float = 0.2,
        kl_limit: float = 0.25,
    ) -> None:
        super().__init__(every_n_steps, rows, min_context, seed, layers, heads)
        whole = isinstance(compare_every, int) and not isinstance(compare_every, bool)
        for name, value, holds, rule in (
            ("validation_batches", validation_batches, validation_batches >= 0, ">= 0"),
            (
                "compare_every",
                compare_every,
                compare_every == "auto" or (whole and int(compare_every) >= 1),
                "'auto' or a number of validations >= 1",
            ),
            ("patience", patience, patience >= 2, ">= 2"),
            ("error_limit", error_limit, error_limit >= 0, ">= 0"),
            ("kl_limit", kl_limit, kl_limit >= 0, ">= 0"),
        ):
            if not holds:
                raise ValueError(f"DenseGapMonitor {name} must be {rule}, got {value!r}")
        self.validation_batches = validation_batches
        self.schedule = CompareSchedule(compare_every)
        self.alarm = Alarm(on_alert)
        self._persistent_error = PersistentError(error_limit, patience)
        self._persistent_gap = PersistentGap(kl_limit)
        self._growing_gap = GrowingGap(kl_limit)
        self._average = Average()
        self._comparison: DenseComparison | None = None
        self._due = False
        self._seconds = 0.0

    # -- sampled rows --

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        names = {"missed_mass": "tau", "output_error": "output_error", "recall": "recall"}
        found = {name: sample.stack(field) for name, field in names.items()}
        values = {"gap/captured_mass": 1 - found["missed_mass"].nanmean()}
        bucket = _buckets(sample)
        for name, value in found.items():
            if value.isnan().all():  # nothing was chosen: no recall
                continue
            values[f"gap/{name}"] = value.nanmean()
            values[f"gap/{name}_p5"] = value.nanquantile(0.05)
            values[f"gap/{name}_p95"] = value.nanquantile(0.95)
            add_histogram(trainer, f"gap_rows/{name}", value)
            if name == "recall":
                continue
            for layer, own in zip(sample.layers, value, strict=True):
                values[f"gap_by_layer/{name}_{layer:02d}"] = own.nanmean()
            for n in bucket[bucket > 0].unique().tolist():
                values[f"gap_by_context/{name}_{n:05d}"] = value[bucket == n].nanmean()
        pl_module.log_dict(values)
        by_head = {name: value.nanmean(1) for name, value in found.items()}
        self._average.add({name.replace("_", " "): value for name, value in by_head.items()})
        places = self._persistent_error.add(sample)
        what = "relative output error at equal contexts has not fallen with a larger budget"
        self.alarm.raise_in(trainer, "persistent_error", places, what)

    # -- the same validation batch, densely --

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.validation_batches and not trainer.enable_validation:
            rank_zero_warn(
                f"DenseGapMonitor has no validation data to compare on: {_COMPARED} are left out, "
                "and so are their alerts. Give fit val_dataloaders and the module a "
                "validation_step, or set validation_batches to 0."
            )
        elif self.validation_batches and not any(map(_has_head, sparse_models(pl_module))):
            rank_zero_warn(
                f"DenseGapMonitor: no sparse model here has a language-model head, {_COMPARED} are "
                "left out, and so are their alerts"
            )
        self.schedule.resume_clock()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._comparison, self._seconds = None, 0.0
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._due = not trainer.sanity_checking and (not fitting or self.schedule.due(trainer))
        if self._due and self.validation_batches and (models := _language_models(pl_module)):
            self._comparison = DenseComparison(models[0])

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._comparison is not None and self._compares(batch_idx, dataloader_idx):
            self._comparison.start_batch()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._comparison is not None and self._compares(batch_idx, dataloader_idx):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            began = time.perf_counter()
            self._comparison.end_batch(trainer, batch)
            self._seconds += time.perf_counter() - began

    def _compares(self, batch_idx: int, dataloader_idx: int) -> bool:
        return batch_idx < self.validation_batches and dataloader_idx == 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._comparison is None:
            return
        gap, self._comparison = self._comparison.result(pl_module), None
        if gap is None:
            return
        values = {"gap/kl": gap.kl, "gap/top1_agreement": gap.top1_agreement}
        for n, kl in gap.by_context().items():
            if 2 * n > self.settings.min_context:  # the buckets that sampled rows have
                values[f"gap_by_context/kl_{n:05d}"] = kl
        if not math.isnan(gap.loss_delta):
            values["gap/loss_delta"] = gap.loss_delta
        pl_module.log_dict(values, sync_dist=True)
        if trainer.state.fn == TrainerFn.FITTING:
            self._judge(trainer, pl_module, gap)

    def _judge(self, trainer: Trainer, pl_module: LightningModule, gap: Gap) -> None:
        for kind, kl, what in (
            (
                "persistent_error",
                self._persistent_gap.add(gap, _mean_keys(pl_module, gap)),
                "KL to dense attention, nats a token, at equal contexts has not fallen with a "
                "larger budget",
            ),
            (
                "gap_grows_with_length",
                self._growing_gap.add(gap),
                "KL to dense attention grows with the context; nats a token of the longest ones",
            ),
        ):
            places = [] if kl is None else [Place(None, None, kl)]
            self.alarm.raise_in(trainer, kind, places, what)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._comparison is not None:
            self._comparison.stop()

    # -- the figure --

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:
            began = time.perf_counter()
            self._draw(trainer)
            self.schedule.paid(self._seconds + time.perf_counter() - began)
        self.schedule.resume_clock()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        panels = self._average.take()
        self.draw(trainer, "gap/by_layer_and_head", "Gap to dense attention", panels)

    # -- state --

    def _parts(self) -> dict[str, Any]:
        return {
            "average": self._average,
            "schedule": self.schedule,
            "alarm": self.alarm,
            "persistent_error": self._persistent_error.phases,
            "persistent_gap": self._persistent_gap.phases,
            "growing_gap": self._growing_gap,
        }

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {"watched": self.watched, **parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            if name != "average" or state_dict["watched"] == self.watched:
                part.load_state_dict(state_dict[name])


def _buckets(sample: Sample) -> Tensor:
    """int64 [layers, R]: the context bucket of each row, 0 where a layer has no row."""
    context = sample.stack("context")
    return torch.where(context.isnan(), 0, log2_bucket(context.nan_to_num(1.0)))


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def _language_models(pl_module: LightningModule) -> list[Any]:
    """Those that obey a law somewhere: no other can lose anything."""
    return [m for m in sparse_models(pl_module) if _has_head(m) and law_layers(m)]


def _mean_keys(pl_module: LightningModule, gap: Gap) -> dict[int, float]:
    """Bucket -> keys that the law gives in its middle, geometric mean over layers."""
    model = _language_models(pl_module)[0]
    budgets = [budget_of(model, layer) for layer in law_layers(model)]
    contexts = torch.tensor(list(gap.by_context()))
    keys = torch.stack([budget(contexts + contexts // 2) for budget in budgets]).double()
    return dict(zip(contexts.tolist(), keys.log().mean(0).exp().tolist(), strict=True))
