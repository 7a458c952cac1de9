"""A progress bar that says where the curriculum is."""

from __future__ import annotations

import math

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar

_SHOWN = (
    # name in the bar, logged metric, format
    ("stage", "curriculum/stage", "{:.0f}"),
    ("len", "curriculum/length", "{:.0f}"),
    ("k(n)", "curriculum/budget", "{:.0f}"),
    ("density", "curriculum/density", "{:.2f}"),
    ("tok/s", "train/tokens_per_second", "{:,.0f}"),
    ("loss", "train/loss", "{:.3f}"),
    ("missed", "gap/missed_mass", "{:.3f}"),
)


class SparseProgressBar(TQDMProgressBar):
    """Lightning's bar with stage, length, k(n), density, tokens/s, loss and the gap to dense.

    `missed` is the softmax mass that the selection does not capture (`DenseGapMonitor`). A metric
    that nobody logs is left out.

    Args:
        refresh_rate: batches between updates.
    """

    def __init__(self, refresh_rate: int = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch:  # whose start, which sets the bar up, is over
            bar, total = self.train_progress_bar, self.total_train_batches
            bar.total = None if math.isinf(total) else int(total)
            bar.n = bar.initial = loop.epoch_loop.batch_progress.current.completed
            bar.set_description(f"Epoch {trainer.current_epoch}")

    @property
    def total_train_batches(self) -> int | float:
        """Micro-batches that this epoch has, up to `max_steps`. Lightning takes the optimizer steps
        that remain for them: with accumulation, or after a resume, the bar runs past its end.
        """
        trainer = self.trainer
        if trainer.max_steps is None or trainer.max_steps < 0:
            return trainer.num_training_batches
        loop = trainer.fit_loop.epoch_loop
        done = loop.batch_progress.current.completed if loop.restarting else 0
        coming = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + coming)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        logged = trainer.callback_metrics
        return {
            name: pattern.format(float(logged[key]))
            for name, key, pattern in _SHOWN
            if key in logged
        }
