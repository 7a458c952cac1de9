"""The plugin in one line: makes the transformers models of any LightningModule sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from lit_sparse.attention import Selection
from lit_sparse.budget import Budget
from lit_sparse.callbacks.common import transformers_models
from lit_sparse.models import (
    Law,
    Observation,
    budget_of,
    is_sparse,
    law_layers,
    law_of,
    observe,
    restore_frequencies,
    sparsify,
)


class SparseAttention(Callback):
    """Replace the attention of every transformers model in the LightningModule by sparse attention.

    Logs, where the trainer logs, `curriculum/budget` (keys of a query at the end of the longest
    document of the batches) and `curriculum/density` (kept causal pairs / causal pairs, mean of
    heads, ranks and the layers that obey a law).

    Args:
        budget: the law k(n), where a stage of `ContextCurriculum` sets none.
        layers: budgets of single layers; `Budget.dense()` keeps a layer dense. Layers with a
            sliding window of their own keep that and are not named.
        block: keys kept or dropped together; a power of two.
        tile: queries that share a selection; a power of two, or None for the default.
        score: "mass", "mean", "variance", "minmax" or "exact".
        backend: of `sparse_attention`; None chooses by device.

    Example:
        >>> from lit_sparse import Budget
        >>> callbacks = [SparseAttention(Budget(alpha=16, exponent=0.5))]
    """

    def __init__(
        self,
        budget: Budget | None = None,
        layers: Mapping[int, Budget] | None = None,
        block: int = 64,
        tile: int | None = None,
        score: str = "mass",
        backend: str | None = None,
    ) -> None:
        self.law = Law(budget or Budget(), dict(layers or {}), block, tile, score)
        self.backend = backend
        self._watch: list[Observation] = []
        self._selections: list[Selection] = []

    @property
    def block(self) -> int:
        return self.law.block

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: configure_model may build the model, and the strategy may wrap it.
        law = self.law
        for model in transformers_models(pl_module):
            if not (is_sparse(model) and law_of(model) == law):
                sparsify(
                    model,
                    law.budget,
                    layers=law.layers,
                    block=law.block,
                    tile=law.tile,
                    score=law.score,
                    backend=self.backend,
                )
            restore_frequencies(model)

    on_test_start = on_fit_start
    on_predict_start = on_fit_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # While fitting the law may be that of a stage.
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step == 0 or (trainer.global_step + 1) % every == 0:
            self._selections = []
            for model in transformers_models(pl_module):
                self._watch.append(observe(model, self._keep, law_layers(model)))

    def _keep(self, layer: int, *tensors_and_selection: Any) -> None:
        self._selections += [x for x in tensors_and_selection if isinstance(x, Selection)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._watch:
            return
        self._end_watch()
        # All ranks go on, also one whose batch was nothing but padding.
        densities = [selection.density for selection in self._selections]
        longest = max((int(np.diff(s.plan.keys).max()) for s in self._selections), default=0)
        self._selections = []
        reduce, device = trainer.strategy.reduce, pl_module.device
        total, count = reduce(
            torch.tensor([sum(densities), len(densities)], device=device), reduce_op="sum"
        )
        longest = int(reduce(torch.tensor(longest, device=device), reduce_op="max"))
        if longest:
            pl_module.log("curriculum/density", total / count)
            budget = budget_of(transformers_models(pl_module)[0])
            pl_module.log("curriculum/budget", float(budget(longest)))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end_watch()
        self._selections = []

    def _end_watch(self) -> None:
        for watch in self._watch:
            watch.remove()
        self._watch = []
