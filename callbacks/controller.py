"""Holds the missed mass at a target while training: alpha rises fast and falls slowly."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lit_sparse.callbacks.common import sparse_models
from lit_sparse.callbacks.sampled import Sample, SampledAttentionMonitor
from lit_sparse.models import alpha_factor, budget_of, law_layers, law_of, scale_budget

_ADVICE = {
    "floor": "the floor of the law decides about every sampled row, so alpha changes nothing: "
    "raise budget.floor",
    "ceiling": "the ceiling of the law decides about every sampled row, so alpha changes nothing: "
    "raise budget.ceiling",
    "most": "alpha is at the largest factor allowed: raise the controller's most, start from a "
    "larger alpha, or accept a larger target",
}
"""What can stop a raise -> what to do."""


class BudgetController(SampledAttentionMonitor):
    """Multiply every layer's alpha by one factor, so that the missed mass stays at a target.

    Measured is tau, the dense softmax mass of the dropped keys, on sampled rows of training steps:
    its 95th percentile over rows, heads and layers. Where it was over `target` in `patience`
    measurements in a row, alpha rises by the factor `up`, and again at each further one; where it
    was under `room * target` in as many, alpha falls by the factor `down`, and then the count
    begins anew. In between nothing moves. The exponent stays: with few lengths in a stage it cannot
    be told from alpha.

    Rows that a raise gives no more blocks of keys (the floor or the ceiling decides, or all is kept
    already) do not count, so that dense stages do not either. When floor, ceiling or `most` stops a
    raise that is needed, a warning says so once.

    The factor holds from the next optimizer step on, for every budget: that of `SparseAttention`,
    of a stage, of single layers. It is a power of `down`, so that laws come back instead of being
    almost the same; `torch.compile` compiles once for each, which a `down` of 0.8 makes fewer. All
    ranks decide alike, a checkpoint holds the factor, an exported model has the law that its last
    step had. Logs `controller/alpha`, `/alpha_factor`, `/missed_mass_p95` and `/target`.

    Args:
        target: missed mass that the 95th percentile may have, in (0, 1).
        every_n_steps, rows, min_context, seed: see `SampledAttentionMonitor`.
        patience: measurements in a row that a move needs.
        up: factor of a raise; rounded to a power of `down`, at least one.
        down: factor of a lowering.
        room: share of the target under which alpha falls.
        most, least: largest and smallest factor on alpha.

    Raises:
        ValueError: a value out of its range; when fitting starts, no sparse model.
    """

    def __init__(
        self,
        target: float = 0.05,
        every_n_steps: int = 50,
        rows: int = 64,
        min_context: int = 64,
        seed: int = 0,
        patience: int = 4,
        up: float = 1.25,
        down: float = 0.97,
        room: float = 0.5,
        most: float = 8.0,
        least: float = 0.125,
    ) -> None:
        super().__init__(every_n_steps, rows, min_context, seed)
        for name, value, holds, rule in (
            ("target", target, 0 < target < 1, "in (0, 1)"),
            ("patience", patience, patience >= 1, ">= 1"),
            ("up", up, 1 < up < math.inf, "> 1"),
            ("down", down, 0 < down < 1, "in (0, 1)"),
            ("room", room, 0 <= room < 1, "in [0, 1)"),
            ("most", most, 1 <= most < math.inf, ">= 1"),
            ("least", least, 0 < least <= 1, "in (0, 1]"),
        ):
            if not holds:
                raise ValueError(f"BudgetController {name} must be {rule}, got {value}")
        self.target, self.patience, self.room = target, patience, room
        self.down = down
        # Levels are powers of 1 / down: a whole number resumes exactly, a product of floats drifts.
        unit = -math.log(down)
        self._up = max(1, round(math.log(up) / unit))
        self._highest = math.floor(math.log(most) / unit + 1e-9)
        self._lowest = -math.floor(-math.log(least) / unit + 1e-9)
        self._level = 0
        self._over = self._under = 0
        self._said: set[str] = set()

    @property
    def factor(self) -> float:
        """What every alpha is multiplied by from the next optimizer step on."""
        return float(self.down**-self._level)

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        tau, grows = _dropping_rows(pl_module, sample, self.down**-self._up)
        if not len(tau):
            return
        counted = tau[grows] if grows.any() else tau
        p95 = float(counted.double().nanquantile(0.95))
        model = sparse_models(pl_module)[0]
        pl_module.log_dict(
            {
                "controller/alpha": law_of(model).budget.alpha,
                "controller/alpha_factor": alpha_factor(model),
                "controller/missed_mass_p95": p95,
                "controller/target": self.target,
            }
        )
        self._over = self._over + 1 if p95 > self.target else 0
        self._under = self._under + 1 if p95 < self.room * self.target else 0
        if self._over >= self.patience:
            if not grows.any():
                self._say(_limit(pl_module, sample), p95)
            elif self._level == self._highest:
                self._say("most", p95)
            else:
                self._level = min(self._level + self._up, self._highest)
        elif self._under >= self.patience and grows.any():
            self._level = max(self._level - 1, self._lowest)
            self._under = 0

    def _say(self, limit: str, p95: float) -> None:
        if limit not in self._said:
            self._said.add(limit)
            rank_zero_warn(
                f"lit-sparse: BudgetController cannot bring the missed mass ({p95:.3g}) down to "
                f"the target of {self.target:g}; {_ADVICE[limit]}"
            )

    def _apply(self, pl_module: LightningModule) -> None:
        for model in sparse_models(pl_module):
            scale_budget(model, self.factor)

    # -- Lightning --

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._apply(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not where it is decided: the micro-batches of a step obey one law.
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._apply(pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A checkpoint is validated under the law that it was trained with.
        if trainer.state.fn != TrainerFn.FITTING:
            self._apply(pl_module)

    on_test_epoch_start = on_validation_epoch_start

    def state_dict(self) -> dict[str, Any]:
        return {
            "level": self._level,
            "over": self._over,
            "under": self._under,
            "said": sorted(self._said),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._level = state_dict["level"]
        self._over, self._under = state_dict["over"], state_dict["under"]
        self._said = set(state_dict["said"])


def _dropping_rows(
    pl_module: LightningModule, sample: Sample, raised: float
) -> tuple[Tensor, Tensor]:
    """Missed mass [N, H] of the rows of all layers that drop something, and bool [N]: whether alpha
    times `raised` gives a row more blocks of keys.
    """
    tau, grows = [torch.empty(0, len(sample.heads))], [torch.empty(0, dtype=torch.bool)]
    first = 0
    for model in sparse_models(pl_module):
        block = law_of(model).block
        for layer in law_layers(model):
            if (rows := sample.layers.get(first + layer)) is not None:
                budget = budget_of(model, layer).scaled(raised)
                seen, kept = (-(-n // block) for n in (rows.context, sample.budgets[first + layer]))
                drops, more = kept < seen, -(-budget(rows.context) // block) > kept
                tau.append(rows.tau[drops])
                grows.append(more[drops])
        first += model.config.num_hidden_layers
    return torch.cat(tau), torch.cat(grows)


def _limit(pl_module: LightningModule, sample: Sample) -> str:
    """Which end of the law its sampled rows are at, where alpha changes nothing."""
    ceilings = {
        law_of(model).of(layer).ceiling
        for model in sparse_models(pl_module)
        for layer in law_layers(model)
    }
    largest = max(int(keys.max()) for keys in sample.budgets.values())
    return "ceiling" if largest in ceilings else "floor"
