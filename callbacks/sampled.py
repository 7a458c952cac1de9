"""What the monitors share: exact statistics of a few rows of attention, at an interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.attention.probe import RowStatistics, probe_rows, sample_rows
from lit_sparse.callbacks.common import sparse_models
from lit_sparse.callbacks.step_seed import seed_of
from lit_sparse.models import Observation, observe


class SampledAttentionMonitor(Callback):
    """Watches the attention of training steps without changing them.

    In the first micro-batch of every `every_n_steps`-th optimizer step each layer's queries, keys
    and values are observed where they pass, detached, and `rows` query rows of them are compared
    with their whole context. Rows come from the monitor's own generator, seeded by the step, so
    that the run is bitwise the same with and without it, and resumes exactly.

    Args:
        every_n_steps: optimizer steps between measurements.
        rows: query rows sampled in each layer.
        min_context: keys that a sampled row sees at least.
        seed: of the rows.
    """

    def __init__(
        self, every_n_steps: int = 50, rows: int = 64, min_context: int = 64, seed: int = 0
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("rows", rows),
            ("min_context", min_context),
        ):
            if value < 1:
                raise ValueError(f"{type(self).__name__} {name} must be >= 1, got {value}")
        self.every_n_steps, self.rows, self.min_context = every_n_steps, rows, min_context
        self.seed = seed
        self._generator = torch.Generator()
        self._watches: list[Observation] = []
        self._statistics: dict[int, RowStatistics] = {}

    def measure(self, layer: int, out: Tensor, statistics: RowStatistics) -> None:
        """One layer's sampled rows, inside the forward; out is its attention's, [T, Hq, D]."""

    def finish(
        self, trainer: Trainer, pl_module: LightningModule, statistics: Mapping[int, RowStatistics]
    ) -> None:
        """All layers of a measured step, layer number -> statistics, ascending."""

    # -- Lightning --

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.global_step % self.every_n_steps == 0:
            self._statistics = {}
            self._generator.manual_seed(seed_of(self.seed, trainer.global_step))
            offset = 0
            for model in sparse_models(pl_module):
                self._watches.append(observe(model, self._observer(offset)))
                offset += model.config.num_hidden_layers

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for watch in self._watches:
            watch.remove()
        self._watches = []
        if self._statistics:
            self.finish(trainer, pl_module, dict(sorted(self._statistics.items())))
            self._statistics = {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for watch in self._watches:
            watch.remove()
        self._watches = []

    def _observer(self, offset: int) -> Any:
        def observer(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            out: Tensor,
            lse: Tensor,
            selection: Selection,
            scale: float,
            documents: Any,
        ) -> None:
            rows = sample_rows(selection.plan, self.rows, self._generator, self.min_context)
            if len(rows):
                statistics = probe_rows(q, k, v, selection, rows, scale)
                self._statistics[offset + layer] = statistics
                self.measure(offset + layer, out, statistics)

        return observer


class Average:
    """Running means of layer x head values between two figures."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a measurement: name -> [layers, heads]."""
        for name, value in values.items():
            value = value.detach().double().cpu()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> dict[str, Tensor]:
        """The means since the last call; empty if nothing was measured."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._count = state_dict["sums"], state_dict["count"]
