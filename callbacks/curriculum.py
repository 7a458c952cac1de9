"""Applies the curriculum: piece length, RoPE and dense or sparse attention of the step's stage."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from lit_sparse.callbacks.common import datamodule_of, transformers_models
from lit_sparse.models import is_sparse, rope_parameters, set_dense, set_max_positions, set_rope
from lit_sparse.training.curriculum import Curriculum, Stage


class ContextCurriculum(Callback):
    """Switch the model to the stage of each optimizer step, and validate where a stage ends.

    The data module cuts its pieces by the same curriculum. Logs `curriculum/stage`,
    `curriculum/length` and `curriculum/rope_theta`.

    Args:
        stages: lengths must not fall; see `Stage`.
        validate_every: optimizer steps between validations besides those at stage ends; None: only
            these.

    Raises:
        ValueError: a stage is out of range, or is longer than the model's positions and neither it
            nor an earlier one has a RoPE rule; the message names its key.
    """

    def __init__(self, stages: list[Stage], validate_every: int | None = None) -> None:
        if validate_every is not None and validate_every < 1:
            raise ValueError(
                f"curriculum.validate_every must be >= 1 or null, got {validate_every}"
            )
        self.curriculum = Curriculum(stages)
        self.validate_every = validate_every
        self._stage: int | None = None

    @property
    def stage(self) -> int:
        """Index of the stage that was applied last; before any, 0."""
        return self._stage or 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for model in transformers_models(pl_module):
            positions = model.config.max_position_embeddings
            for i, stage in enumerate(self.curriculum.stages):
                ruled = any(earlier.rope for earlier in self.curriculum.stages[: i + 1])
                if stage.length > positions and not ruled:
                    raise ValueError(
                        f"curriculum.stages[{i}].length = {stage.length} is longer than the "
                        f"{positions} positions of the model (max_position_embeddings): give "
                        "the stage a RoPE rule, e.g. rope: {rope_theta: 500000.0}"
                    )

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
        if "rope_theta" in rope:
            pl_module.log("curriculum/rope_theta", float(rope["rope_theta"]))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            if self._stage is None:  # the sanity check, before training starts
                self._apply(trainer, pl_module, self.curriculum.index_at(trainer.global_step))
        else:
            last = len(self.curriculum.stages) - 1
            self._apply(trainer, pl_module, last if self._stage is None else self._stage)

    on_test_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage = state_dict["stage"]

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
            # All rules up to here, in order: a resumed run has a model without any of them.
            for earlier in self.curriculum.stages[: index + 1]:
                if earlier.rope:
                    set_rope(model, **earlier.rope)
            if stage.length > model.config.max_position_embeddings:
                set_max_positions(model, stage.length)
            if is_sparse(model):
                set_dense(model, stage.attention == "dense")
        datamodule = datamodule_of(trainer)
        if hasattr(datamodule, "validation_length"):
            datamodule.validation_length = stage.length
        self._stage = index
