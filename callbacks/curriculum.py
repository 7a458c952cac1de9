"""Applies the curriculum: piece length, RoPE, budget, dense or sparse attention of a stage."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from lit_sparse.callbacks.common import datamodule_of, transformers_models
from lit_sparse.models import (
    RopeOrigin,
    extend_context,
    idle_window,
    is_sparse,
    rope_parameters,
    set_budget,
    set_dense,
)
from lit_sparse.training.curriculum import Curriculum, Doubling, Stage


class ContextCurriculum(Callback):
    """Switch the model to the stage of each optimizer step, and validate where a stage ends.

    The data module cuts its pieces by the same curriculum, and `SparseLM` takes the stages'
    learning rates from it. RoPE rules start from the model as it was loaded; where
    `model.pretrained` is the export of an earlier run, from what that run left. Logs
    `curriculum/stage`, `/length`, `/rope_theta` and, where RoPE has one, `/rope_factor`.

    Args:
        stages: lengths must not fall; see `Stage`. Give these or `doubling`.
        validate_every: optimizer steps between validations besides those at stage ends; None: only
            these.
        doubling: stages whose lengths double, in one line; see `Doubling`.

    Raises:
        ValueError: a stage is out of range, asks for what model or module cannot do, or is longer
            than the model's positions without RoPE for it; the message names its key.
    """

    def __init__(
        self,
        stages: list[Stage] | None = None,
        validate_every: int | None = None,
        doubling: Doubling | None = None,
    ) -> None:
        if validate_every is not None and validate_every < 1:
            raise ValueError(
                f"curriculum.validate_every must be >= 1 or null, got {validate_every}"
            )
        if (stages is None) == (doubling is None):
            raise ValueError(
                "curriculum: set exactly one of stages and doubling (null takes away that of an "
                "earlier config)"
            )
        self.curriculum = Curriculum(doubling.stages() if doubling else stages or [])
        self.validate_every = validate_every
        self._stage: int | None = None
        self._datamodule: Any = None

    @property
    def stage(self) -> int:
        """Index of the stage that was applied last; before any, 0."""
        return self._stage or 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._datamodule = datamodule_of(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_data()
        self._check_learning_rates(pl_module)
        for model in transformers_models(pl_module):
            self._check_lengths(model)
            for i in range(len(self.curriculum.stages)):
                try:
                    self._extend(model, i)
                except ValueError as error:
                    raise ValueError(f"curriculum.stages[{i}].rope: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: there a resumed run does not know its step yet.
        self._apply(trainer, pl_module, self.curriculum.index_at(trainer.global_step))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        index = self.curriculum.index_at(step)
        if index != self._stage:
            self._apply(trainer, pl_module, index)
        # Lightning validates after every val_check_batch-th batch: the next one wanted is the only
        # multiple of itself on the way there.
        trainer.val_check_batch = (
            self._next_validation(trainer, step) * trainer.accumulate_grad_batches
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stage = self.curriculum.stages[self.stage]
        pl_module.log("curriculum/stage", float(self.stage + 1))
        pl_module.log("curriculum/length", float(stage.length))
        rope = rope_parameters(transformers_models(pl_module)[0])
        for key, name in (("rope_theta", "rope_theta"), ("factor", "rope_factor")):
            if rope.get(key) is not None:
                pl_module.log(f"curriculum/{name}", float(rope[key]))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After every callback's on_validation_start: one of them may have made the model sparse.
        if trainer.state.fn != TrainerFn.FITTING:
            last = len(self.curriculum.stages) - 1
            self._apply(trainer, pl_module, last if self._stage is None else self._stage)
        elif trainer.sanity_checking:
            self._apply(trainer, pl_module, self.curriculum.index_at(trainer.global_step))

    on_test_epoch_start = on_validation_epoch_start

    def state_dict(self) -> dict[str, Any]:
        # The stages are for the model card of an export from the checkpoint.
        return {"stage": self._stage, "stages": [asdict(s) for s in self.curriculum.stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stage = state_dict["stage"]
        self._stage = None if stage is None else min(stage, len(self.curriculum.stages) - 1)
        # Workers of a loader read ahead before a validation says that it starts.
        self._set_validation_length(self.curriculum.stages[self.stage])

    def _next_validation(self, trainer: Trainer, step: int) -> int:
        end = self.curriculum.ends[self.curriculum.index_at(step)]
        if trainer.max_steps is not None and trainer.max_steps > 0:
            end = min(end, trainer.max_steps)
        if self.validate_every is not None:
            end = min(end, (step // self.validate_every + 1) * self.validate_every)
        return max(end, step + 1)

    def _apply(self, trainer: Trainer, pl_module: LightningModule, index: int) -> None:
        stage = self.curriculum.stages[index]
        for model in transformers_models(pl_module):
            self._extend(model, index)
            if is_sparse(model):
                set_budget(model, stage.budget)
                set_dense(model, stage.attention == "dense")
        self._set_validation_length(stage)
        self._stage = index

    def _set_validation_length(self, stage: Stage) -> None:
        if hasattr(self._datamodule, "validation_length"):
            self._datamodule.validation_length = stage.length

    def _extend(self, model: Any, index: int) -> None:
        stages = self.curriculum.stages[: index + 1]
        extend_context(model, [(stage.length, stage.rope) for stage in stages])

    def _check_data(self) -> None:
        other = getattr(self._datamodule, "curriculum", None)
        if isinstance(other, Curriculum) and other.stages != self.curriculum.stages:
            raise ValueError(
                "data.curriculum has other stages than the ContextCurriculum callback: give the "
                "data module the curriculum attribute of the callback"
            )

    def _check_learning_rates(self, pl_module: LightningModule) -> None:
        asking = [i for i, s in enumerate(self.curriculum.stages) if s.learning_rate is not None]
        if asking and not getattr(pl_module, "applies_stage_learning_rates", False):
            raise ValueError(
                f"curriculum.stages[{asking[0]}].learning_rate is set, but "
                f"{type(pl_module).__name__} does not apply it: leave it out, or schedule by "
                "curriculum.learning_rate(step, default) and set applies_stage_learning_rates = "
                "True on the class"
            )

    def _check_lengths(self, model: Any) -> None:
        origin = RopeOrigin.of(model)
        window, longest = idle_window(model), self.curriculum.longest
        if window is not None and longest > window:
            raise ValueError(
                f"curriculum: a stage of {longest} tokens goes past the sliding window of {window} "
                f"keys of the model, which limits nothing up to its {origin.positions} positions: "
                "set sliding_window: null in its config, or end the curriculum there"
            )
        reach, ruled = origin.context, ""
        for i, stage in enumerate(self.curriculum.stages):
            if stage.rope is not None and "rule" not in stage.rope:
                return  # who gives parameters says how far they reach
            if stage.rope is not None:
                reach = max(reach, stage.length)
                ruled = f", or with the rule of stages[{i}]"
            elif stage.length > reach:
                kind = origin.parameters["rope_type"]  # a scaled model goes on by its own rule
                rule = kind if kind in ("linear", "yarn", "llama3") else "abf"
                raise ValueError(
                    f"curriculum.stages[{i}].length = {stage.length} is longer than the {reach} "
                    f"positions of the model (max_position_embeddings{ruled}): give the stage a "
                    f"RoPE rule, e.g. rope: {{rule: {rule}}}"
                )
