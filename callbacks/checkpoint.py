"""Checkpoints that a run continues from as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lit_sparse.callbacks.common import datamodule_of
from lit_sparse.callbacks.curriculum import ContextCurriculum
from lit_sparse.callbacks.logged import logged_state, restore_logged
from lit_sparse.callbacks.stop import StopSignals
from lit_sparse.distributed.checkpoint import description
from lit_sparse.training.checkpoint import (
    AtomicCheckpointIO,
    checkpoint_name,
    checkpoint_step,
    checkpoints,
    event_sizes,
    remove_unfinished,
)


class RunCheckpoint(Checkpoint):
    """Save a run between optimizer steps, so that its continuation is bitwise the same run.

    A checkpoint is taken every `every_n_steps` optimizer steps, after the validation at each
    stage's end, at the end of training, and when SIGTERM or Ctrl-C asks to stop: then the process
    exits with 128 + the number of the signal, 143 or 130. A second signal ends it at once.

    The moment is the start of the next step, before any other callback acts on it: the step before
    is complete with its validation and its metrics are in the event files. Checkpoints are
    `step=N.ckpt` after N steps, and appear whole or not at all: files, or under
    `DeepSpeedSparseStrategy` directories of shards, which only the same number of ranks at the same
    ZeRO stage can go on from. `StepSeed` makes the randomness of
    a run a function of the step. The loader must begin where the run goes on: those of
    `PackedTextDataModule` do, one with `state_dict` (torchdata's StatefulDataLoader) does, and with
    a plain one Lightning warns that it starts its epoch over.

    Besides what Lightning saves, the checkpoint holds, under "lit_sparse": the last value of each
    logged metric, the sizes of the event files, the number of ranks, and the `fingerprint` of the
    data module where it has one. Every checkpoint, of `ModelCheckpoint` too, says there how it is
    sharded and which models it holds, see `lit_sparse.distributed.checkpoint.description`.

    Args:
        every_n_steps: optimizer steps between checkpoints; None: only at stage ends and at the end.
        keep: newest checkpoints that are kept, besides those of stage ends.
        keep_stage_ends: keep those of all stage ends too.
        dirpath: where to; None: `checkpoints` in the trainer's log directory.
    """

    def __init__(
        self,
        every_n_steps: int | None = 100,
        keep: int = 3,
        keep_stage_ends: bool = True,
        dirpath: str | None = None,
    ) -> None:
        for key, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{key} must be >= 1, got {value}")
        self.every_n_steps, self.keep, self.keep_stage_ends = every_n_steps, keep, keep_stage_ends
        self.dirpath = dirpath
        self._directory = Path()
        self._stage_ends: set[int] = set()
        self._stop = StopSignals()
        self._saved = 0
        self._saving = False
        self._logged: dict[str, Any] | None = None
        self._loaders: list[dict[str, Any]] = []
        self._others: list[ModelCheckpoint] = []

    @property
    def best_model_path(self) -> str:
        """That of the `ModelCheckpoint` beside it: Lightning asks the first of all, for
        `ckpt_path="best"`. "" where there is none.
        """
        return next((other.best_model_path for other in self._others), "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # First, where Lightning has put it last: what is saved has nothing of the next step.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]
        self._others = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
        self._stage_ends = {
            end for c in callbacks if isinstance(c, ContextCurriculum) for end in c.curriculum.ends
        }
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        log_directory = trainer.log_dir or trainer.default_root_dir
        self._directory = Path(self.dirpath or Path(log_directory) / "checkpoints")
        if trainer.is_global_zero:
            remove_unfinished(self._directory)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._logged = checkpoint.get("lit_sparse", {}).get("logged")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        if trainer.fit_loop._combined_loader_states_to_load:
            # A module that asks for estimated_stepping_batches has the loaders made before the
            # trainer knows where they start: they are made again.
            trainer.fit_loop._combined_loader = None
        if self._logged is not None:
            restore_logged(trainer, self._logged)
            self._logged = None
        self._stop.install(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        signal = self._stop.agreed(trainer)
        if signal or self._due(trainer.global_step):
            self._save(trainer)
        if signal:
            rank_zero_info(
                f"stopped after {trainer.global_step} optimizer steps, saved in {self._directory}; "
                "go on with the same command and --ckpt_path last"
                if trainer.global_step
                else "stopped before the first optimizer step; there is nothing to go on from"
            )
            self._stop.requeue(trainer, signal)
            raise SIGTERMException(128 + signal)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # When the next step starts, its first batch has left the loaders. An epoch starts afresh.
        loaders: Any = trainer.fit_loop._combined_loader
        self._loaders = [] if trainer.is_last_batch else loaders._state_dicts()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop._should_accumulate():  # stopped in the middle of a step otherwise
            self._save(trainer)
        self._stop.restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop.restore()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        sharding = getattr(trainer.strategy, "sharding", None)
        checkpoint["lit_sparse"] = description(pl_module, sharding)
        if not self._saving:  # somebody else's checkpoint, maybe in the middle of a step
            return
        fit_loop = checkpoint["loops"]["fit_loop"]
        _set_between_steps(fit_loop)
        fit_loop["state_dict"]["combined_loader"] = self._loaders
        checkpoint["lit_sparse"] |= {
            "logged": logged_state(trainer),
            "events": event_sizes(self._directory.parent) if trainer.is_global_zero else {},
            "ranks": trainer.world_size,
            "data": getattr(datamodule_of(trainer), "fingerprint", None),
        }

    def _due(self, step: int) -> bool:
        regular = self.every_n_steps is not None and step % self.every_n_steps == 0
        return regular or step in self._stage_ends

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()
        self._saving = True
        try:
            path = self._directory / checkpoint_name(trainer.global_step)
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._saving = False
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            self._remove_old(trainer)

    def _remove_old(self, trainer: Trainer) -> None:
        kept = self._stage_ends if self.keep_stage_ends else set()
        passing = [p for p in checkpoints(self._directory) if checkpoint_step(p) not in kept]
        for path in passing[: -self.keep]:
            trainer.strategy.remove_checkpoint(path)


def _set_between_steps(fit_loop: dict[str, Any]) -> None:
    """Make the counters of Lightning's loops those of a run between two optimizer steps.

    The coming batch is counted as ready already, or the last epoch as complete. Lightning would
    then guess on restart what was interrupted; with nothing begun it just goes on, without a
    validation or a step of the x axis too many.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    for scope in ("total", "current"):
        done = batches[scope]["completed"]
        batches[scope].update(ready=done, started=done, processed=done)
        begun = epochs[scope]["ready"]
        epochs[scope].update(started=begun, processed=begun - 1, completed=begun - 1)
    batches["is_last_batch"] = False
