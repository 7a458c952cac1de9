"""Is attention collapsing? Concentration and dispersion, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from lit_sparse.callbacks.alerts import Alarm, Reaction
from lit_sparse.callbacks.collapse_metrics import head_metrics, row_metrics, spread
from lit_sparse.callbacks.collapse_rules import CollapseLimits, CollapseRules
from lit_sparse.callbacks.common import add_histogram
from lit_sparse.callbacks.projection_gradients import projection_gradients, total
from lit_sparse.callbacks.sampled import Average, SampledAttentionMonitor
from lit_sparse.callbacks.sampler import Sample

_BY_LAYER = ("entropy_ratio", "max_weight_without_sink", "saturated", "rank_residual")
_HISTOGRAMS = ("entropy_ratio", "max_weight_without_sink", "logit_max")
_PANELS = (
    "entropy_ratio",
    "max_weight_without_sink",
    "saturated",
    "effective_support",
    "sink_mass",
    "gamma_of_entropy",
    "logit_max",
    "range_margin",
    "rank_residual",
)


class CollapseMonitor(SampledAttentionMonitor):
    """Log how sharp attention is and alert when heads collapse in either direction.

    On sampled rows of training steps, under the dense softmax of each row: entropy, weights,
    logits, and how alike a head's outputs are, as `collapse/NAME` (means over rows, heads and
    layers; `logit_max` is the largest of all), `collapse_spread/NAME_p5` and `_p95`,
    `collapse_by_layer/NAME_LL`, histograms of rows in `collapse_rows/NAME` and, after a validation,
    a figure by layer and head. Before the optimizer's step, norms of the gradients of the query and
    key projections: `collapse/query_grad_norm`, `collapse/key_grad_norm` (of Phi-3's one matrix:
    `collapse/query_key_value_grad_norm`). callbacks/README.md says what each means.

    The two failures have opposite cures and alerts of their own: concentration (a few keys have
    everything) and dispersion (all keys have the same). Healthy heads are often sharp from the
    start, so an alert wants `patience` measurements on end past its limit, and a change against the
    first one. Each is raised once in a place.

    Args:
        every_n_steps, rows, min_context, seed, layers, heads: see `SampledAttentionMonitor`.
        patience: measurements on end that an alert wants.
        limits: see `CollapseLimits`; None: its defaults.
        on_alert: "warn": a warning and a TensorBoard text under `alerts/`; "stop": training ends
            after the step, too; or a function that is called with trainer and alert, on every rank.

    Raises:
        ValueError: a value out of its range; see `SampledAttentionMonitor`.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        rows: int = 64,
        min_context: int = 64,
        seed: int = 0,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        patience: int = 4,
        limits: CollapseLimits | None = None,
        on_alert: Reaction = "warn",
    ) -> None:
        super().__init__(every_n_steps, rows, min_context, seed, layers, heads)
        if patience < 1:
            raise ValueError(f"CollapseMonitor patience must be >= 1, got {patience}")
        if not isinstance(limits, CollapseLimits | None):
            raise ValueError(f"CollapseMonitor limits must be CollapseLimits(...), got {limits!r}")
        self.limits = limits or CollapseLimits()
        self._rules = CollapseRules(self.limits, patience)
        self._alarm = Alarm(on_alert)
        self._average = Average()
        self._said_invisible = False

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        rows = row_metrics(sample, self.limits.missed_mass)
        heads = head_metrics(sample, rows)
        values = {f"collapse/{name}": value.nanmean() for name, value in heads.items()}
        values["collapse/logit_max"] = heads["logit_max"].nan_to_num(-torch.inf).max()
        for name, value in spread({**heads, **rows}).items():
            values[f"collapse_spread/{name}"] = value
        for name in _BY_LAYER:
            for layer, value in zip(sample.layers, heads[name], strict=True):
                values[f"collapse_by_layer/{name}_{layer:02d}"] = value.nanmean()
        # One row alone has no rank residual.
        pl_module.log_dict({name: value for name, value in values.items() if not value.isnan()})
        for name in _HISTOGRAMS:
            add_histogram(trainer, f"collapse_rows/{name}", rows[name])
        self._average.add({name: heads[name] for name in _PANELS})
        for finding in self._rules.judge(sample, rows, heads):
            self._alarm.raise_in(trainer, finding.kind, finding.places, finding.what)

    # -- gradients --

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self.settings.due(trainer.global_step):
            return
        gradients = projection_gradients(trainer, pl_module)
        if gradients is None:
            if not self._said_invisible:
                self._said_invisible = True
                rank_zero_warn(
                    "CollapseMonitor: this rank has no whole gradients of the query and key "
                    f"projections (they are sharded by {type(trainer.strategy).__name__}), so "
                    "their norms are not logged"
                )
            return
        for name, norms in gradients.items():
            if norms:
                pl_module.log(f"collapse/{name}_grad_norm", total(norms))
            for layer, norm in norms.items():
                pl_module.log(f"collapse_by_layer/{name}_grad_norm_{layer:02d}", norm)

    # -- state --

    def state_dict(self) -> dict[str, Any]:
        return {
            "watched": self.watched,
            "average": self._average.state_dict(),
            "rules": self._rules.state_dict(),
            "alarm": self._alarm.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._alarm.load_state_dict(state_dict["alarm"])
        if state_dict["watched"] == self.watched:
            self._average.load_state_dict(state_dict["average"])
            self._rules.load_state_dict(state_dict["rules"])

    # -- the figure --

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        panels = {name.replace("_", " "): x for name, x in self._average.take().items()}
        self.draw(trainer, "collapse/by_layer_and_head", "Attention by layer and head", panels)
