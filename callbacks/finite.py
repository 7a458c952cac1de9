"""Stops a run before a loss or gradient that is not finite reaches the weights."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_sparse.callbacks.alerts import Alarm, Place, Reaction
from lit_sparse.callbacks.not_finite import (
    OutputWatch,
    gradient_norm,
    last_bad_gradient,
    own_gradients,
)
from lit_sparse.distributed.gradients import discard_step, overflow_is_expected


class FiniteGuard(Callback):
    """End training before the optimizer's step if a loss or a gradient is NaN or infinite, and name
    the layer where it began.

    Loss and gradients of the whole step (all micro-batches, all ranks, before clipping) are looked
    at once, before the optimizer's step. A hook on each layer adds up its output, so that the layer
    is known without running anything again: the first one, in the order in which they ran, whose
    output was not finite; or, if all were, the last one that has a gradient that is not, since
    backward runs from the end. For any LightningModule with automatic optimization. In float16
    gradients that overflow are the business of who scales the loss, and only layers' outputs are
    looked at. Where gradients are sharded (DeepSpeed, FSDP) each rank looks at those it has, and
    all ranks name the same place; ZeRO by itself would skip such a step without a word.

    Costs a sum over each layer's output, a norm over the gradients, one wait for the device a step,
    and with several ranks one all-reduce of a number, so that all do the same.

    Args:
        on_alert: "raise": a FloatingPointError; otherwise the step's gradients are thrown away, the
            weights stay as they are, and `train/steps_not_finite` counts: "warn": training goes on;
            "stop": it ends after this step; or a function that is called with trainer and alert, on
            every rank. All of them after an alert `not_finite`.

    Raises:
        ValueError: another `on_alert`.
        FloatingPointError: while training, with the name of the layer.
    """

    def __init__(self, on_alert: Literal["raise"] | Reaction = "raise") -> None:
        if isinstance(on_alert, str) and on_alert not in ("raise", "warn", "stop"):
            raise ValueError(
                "FiniteGuard on_alert must be 'raise', 'warn', 'stop' or a callable, got "
                f"{on_alert!r}"
            )
        self.raises = on_alert == "raise"
        self._alarm = Alarm("warn" if on_alert == "raise" else on_alert)
        self._watch: OutputWatch | None = None
        self._loss: Tensor | None = None
        self._thrown_away = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch = OutputWatch(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._forget()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        number = self._find(trainer, pl_module)
        if trainer.world_size > 1:
            code = torch.tensor(number, device=pl_module.device)
            number = int(trainer.strategy.reduce(code, reduce_op="max"))
        if number:
            self._act(trainer, pl_module, optimizer, number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
        self._forget()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)

    def _forget(self) -> None:
        self._loss = None
        if self._watch is not None:
            self._watch.forget()

    # -- finding --

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """0, or a number of the place, the greater the earlier in the step: the greatest of all
        ranks is where it began.
        """
        norm = gradient_norm(own_gradients(trainer, pl_module))
        summed = norm if self._loss is None else norm + self._loss.to(norm.device)
        if self._watch is None or bool(summed.isfinite()):
            return 0
        parameters, layers = len(list(pl_module.parameters())), list(self._watch.layers)
        if (layer := self._watch.first_bad()) is not None:
            return parameters + 1 + len(layers) - layers.index(layer)
        if overflow_is_expected(trainer):
            return 0
        if self._loss is not None and not bool(self._loss.isfinite()):
            return parameters + 1
        # None: the norm alone was too large for its dtype.
        name = last_bad_gradient(own_gradients(trainer, pl_module))
        return 0 if name is None else 1 + [n for n, _ in pl_module.named_parameters()].index(name)

    def _name(self, pl_module: LightningModule, number: int) -> str:
        parameters = [name for name, _ in pl_module.named_parameters()]
        layers = list(self._watch.layers) if self._watch is not None else []
        if number > len(parameters) + 1:
            return f"the output of {layers[len(parameters) + 1 + len(layers) - number]}"
        if number == len(parameters) + 1:
            return "the loss, though all layers' outputs are finite,"
        name = parameters[number - 1]
        return f"a gradient in {next((x for x in layers if name.startswith(f'{x}.')), name)}"

    # -- acting --

    def _act(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, number: int
    ) -> None:
        what = f"{self._name(pl_module, number)} is not finite"
        layer = re.search(r"\.layers\.(\d+)\b", what)
        place = Place(int(layer[1]) if layer else None, None, math.nan)
        self._alarm.raise_in(trainer, "not_finite", [place], what)
        if self.raises:
            raise FloatingPointError(
                f"step {trainer.global_step}: {what}; the optimizer has not seen it, the weights "
                "are those before this step (callbacks/README.md, alerts/not_finite)"
            )
        discard_step(trainer, optimizer)
        self._thrown_away += 1
        pl_module.log("train/steps_not_finite", float(self._thrown_away))

    def state_dict(self) -> dict[str, Any]:
        return {"alarm": self._alarm.state_dict(), "thrown_away": self._thrown_away}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._alarm.load_state_dict(state_dict["alarm"])
        self._thrown_away = state_dict["thrown_away"]
