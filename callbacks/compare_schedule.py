"""Which validations also run densely: at an interval, or as often as their own cost allows."""

from __future__ import annotations

import time
from typing import Any, Literal

from pytorch_lightning import Trainer

from lit_sparse.training.curriculum import find_curriculum

SHARE = 0.01
"""Of the training time, that `auto` lets comparisons cost."""


class CompareSchedule:
    """Decides, validation by validation; always at stage ends and at the last one.

    `auto` measures what a comparison costs, and compares again when all of them together stay under
    `SHARE` of the training time. It goes by the clock, so a resumed run may compare in other
    validations inside a stage.

    Args:
        every: "auto", or validations from one comparison to the next.
    """

    def __init__(self, every: Literal["auto"] | int) -> None:
        self.every = every
        self._validations = 0
        self._trained = 0.0
        self._spent = 0.0
        self._last_cost = 0.0
        self._mark: float | None = None

    def resume_clock(self) -> None:
        """Training goes on."""
        self._mark = time.perf_counter()

    def due(self, trainer: Trainer) -> bool:
        """Whether the validation that starts now compares; the same on every rank."""
        if self._mark is not None:
            self._trained += time.perf_counter() - self._mark
            self._mark = None
        self._validations += 1
        if self.every != "auto":
            return self._validations % self.every == 0 or is_stage_end(trainer)
        affordable = self._spent + self._last_cost <= SHARE * self._trained
        wanted = not self._spent or affordable or is_stage_end(trainer)
        return bool(trainer.strategy.broadcast(wanted))

    def paid(self, seconds: float) -> None:
        """What a comparison cost."""
        self._last_cost = seconds
        self._spent += seconds

    def state_dict(self) -> dict[str, Any]:
        clock = {"trained": self._trained, "spent": self._spent, "last_cost": self._last_cost}
        return {"validations": self._validations, **clock}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]
        self._trained, self._spent = state_dict["trained"], state_dict["spent"]
        self._last_cost = state_dict["last_cost"]


def is_stage_end(trainer: Trainer) -> bool:
    """Whether a curriculum's stage, or the training, has just ended."""
    curriculum = find_curriculum(trainer)
    step = trainer.global_step
    if curriculum is not None and step in curriculum.ends:
        return True
    # Not estimated_stepping_batches: for a stream without a length that is max_steps, -1 for none.
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
