"""Is attention collapsing? Concentration and dispersion, by layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lit_sparse.callbacks.common import add_figure, add_text
from lit_sparse.callbacks.heatmap import heat_maps
from lit_sparse.callbacks.sampled import Average, Sample, SampledAttentionMonitor

ADVICE = {
    "concentration": "lower the learning rate of the query and key projections, or use QK-norm",
    "dispersion": "raise the budget's alpha, or scale queries with ln n",
    "large logits": "lower the learning rate of the query and key projections, or use QK-clip",
}
"""Alert -> what to do; callbacks/README.md has the long form."""


class CollapseMonitor(SampledAttentionMonitor):
    """Log how sharp attention is and alert when heads collapse in either direction.

    On sampled rows of training steps, under the dense softmax of each row, means over rows, heads
    and layers of: `collapse/entropy_ratio` (H / ln n; near 0 concentrated, near 1 dispersed),
    `collapse/max_weight` (without the sink tokens), `collapse/effective_support` (exp H, keys),
    `collapse/sink_mass`, `collapse/logit_std`, `collapse/logit_max` (largest of all),
    `collapse/gamma` (sigma^2 / 2 ln n, Gaussian logits collapse at 1) and `collapse/rank_residual`
    (||X - mean|| / ||X|| of a head's outputs; near 0 all tokens get the same). Entropy ratio by
    layer; after a validation, a figure of all by layer and head.

    A head alerts, once a kind, when its average over the last measurements is past a threshold and
    has moved there since the first one: healthy heads are often sharp from the start. Alerts are
    warnings and TensorBoard texts under `alerts/`.

    Args:
        every_n_steps, rows, min_context, seed, layers, heads: see `SampledAttentionMonitor`.
        patience: measurements that an alert's average covers, and that there must be first.
        concentration, dispersion: entropy ratios below and above which a head alerts.
        largest_logit: absolute logit above which a head alerts.
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
        concentration: float = 0.05,
        dispersion: float = 0.95,
        largest_logit: float = 50.0,
    ) -> None:
        super().__init__(every_n_steps, rows, min_context, seed, layers, heads)
        if patience < 1:
            raise ValueError(f"CollapseMonitor patience must be >= 1, got {patience}")
        self.patience = patience
        self.concentration, self.dispersion = concentration, dispersion
        self.largest_logit = largest_logit
        self._average = Average()
        self._first: dict[str, Tensor] = {}
        self._smooth: dict[str, Tensor] = {}
        self._measured = 0
        self._alerted: set[tuple[str, int, int]] = set()

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        heads = {
            name: sample.stack(field).nanmean(1)
            for name, field in (
                ("entropy_ratio", "entropy_ratio"),
                ("max_weight", "max_weight_without_sink"),
                ("effective_support", "effective_support"),
                ("sink_mass", "sink_mass"),
                ("logit_std", "logit_std"),
                ("gamma", "gamma"),
            )
        }
        heads["rank_residual"] = torch.stack([x[0] for x in sample.similarity.values()])
        largest = sample.stack("logit_max").nan_to_num(0.0).amax(1)
        values = {f"collapse/{name}": value.mean() for name, value in heads.items()}
        values["collapse/logit_max"] = largest.max()
        for layer, value in zip(sample.layers, heads["entropy_ratio"], strict=True):
            values[f"collapse_by_layer/entropy_ratio_{layer:02d}"] = value.mean()
        pl_module.log_dict(values)
        self._average.add(heads)
        self._judge(
            trainer, list(sample.layers), {"entropy": heads["entropy_ratio"], "logit": largest}
        )

    # -- alerts --

    def _judge(self, trainer: Trainer, layers: list[int], values: Mapping[str, Tensor]) -> None:
        self._measured += 1
        for name, value in values.items():
            value = value.cpu()
            self._first.setdefault(name, value)
            before = self._smooth.get(name, value)
            self._smooth[name] = before + (value - before) / min(self._measured, self.patience)
        if self._measured < self.patience:
            return
        entropy, logit = self._smooth["entropy"], self._smooth["logit"]
        moved = entropy - self._first["entropy"]
        past = {
            "concentration": (entropy < self.concentration) & (moved < 0),
            "dispersion": (entropy > self.dispersion) & (moved > 0),
            "large logits": (logit > self.largest_logit) & (logit > self._first["logit"]),
        }
        shown = {"concentration": entropy, "dispersion": entropy, "large logits": logit}
        for kind, flags in past.items():
            new = [
                (i, head)
                for i, head in flags.nonzero().tolist()
                if (kind, layers[i], head) not in self._alerted
            ]
            if new:
                self._alerted |= {(kind, layers[i], head) for i, head in new}
                self._alert(
                    trainer, kind, [(layers[i], head, shown[kind][i, head]) for i, head in new]
                )

    def _alert(self, trainer: Trainer, kind: str, heads: list[tuple[int, int, Tensor]]) -> None:
        listed = ", ".join(
            f"layer {layer} head {head}: {value:.3g}" for layer, head, value in heads[:8]
        )
        more = f" and {len(heads) - 8} more" if len(heads) > 8 else ""
        text = f"{kind} at step {trainer.global_step} ({listed}{more}); {ADVICE[kind]}"
        rank_zero_warn(f"attention collapse: {text}")
        add_text(trainer, f"alerts/{kind.replace(' ', '_')}", text)

    def state_dict(self) -> dict[str, Any]:
        return {
            "average": self._average.state_dict(),
            "first": self._first,
            "smooth": self._smooth,
            "measured": self._measured,
            "alerted": sorted(self._alerted),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average.load_state_dict(state_dict["average"])
        self._first, self._smooth = state_dict["first"], state_dict["smooth"]
        self._measured = state_dict["measured"]
        self._alerted = {tuple(alert) for alert in state_dict["alerted"]}

    # -- the figure --

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if panels := self._average.take():
            titles = {name.replace("_", " "): value for name, value in panels.items()}
            figure = heat_maps(titles, f"Attention by layer and head, step {trainer.global_step}")
            add_figure(trainer, "collapse/by_layer_and_head", figure)
