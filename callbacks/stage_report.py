"""A short table at the end of training: what each stage cost and reached."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lit_sparse.callbacks.common import datamodule_of
from lit_sparse.callbacks.curriculum import ContextCurriculum
from lit_sparse.distributed import ranks_of

_COLUMNS = (
    # title, key of a row, format
    ("stage", "stage", "{:.0f}"),
    ("length", "curriculum/length", "{:.0f}"),
    ("k(n)", "curriculum/budget", "{:.0f}"),
    ("density", "curriculum/density", "{:.3f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("bits/byte", "val/bits_per_byte", "{:.3f}"),
    ("unigram", "unigram_bits_per_byte", "{:.3f}"),
    ("passkey", "passkey/teacher_forced", "{:.0%}"),
    ("digits", "passkey/token_accuracy", "{:.0%}"),
    ("generated", "passkey/generated", "{:.0%}"),
    ("captured", "gap/captured_mass", "{:.3f}"),
    ("KL to dense", "gap/kl", "{:.4f}"),
)


class StageReport(Callback):
    """Collect the logged metrics when a stage is validated, and print one line a stage at the end.

    Tokens/s is training time alone, over the whole stage. The rows are also written to
    `stages.json` in the log directory. Put it after the callbacks whose metrics it shows.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._stage: int | None = None
        self._tokens, self._seconds = 0, 0.0
        self._mark: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._mark = self._mark or time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if (stage := _stage(trainer)) != self._stage:
            self._stage, self._tokens, self._seconds = stage, 0, 0.0
        self._tokens += batch["input_ids"].numel() * ranks_of(trainer).data_size
        self._seconds += now - (self._mark or now)
        self._mark = now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._seconds:
            return
        row = {key: float(value) for key, value in trainer.callback_metrics.items()}
        row["step"] = trainer.global_step
        row["tokens_per_second"] = self._tokens / self._seconds
        unigram = getattr(datamodule_of(trainer), "unigram_bits_per_byte", None)
        if unigram is not None:
            row["unigram_bits_per_byte"] = unigram
        row["stage"] = _stage(trainer) + 1
        # A validation inside a stage is replaced by the one at its end.
        self.rows = [*(r for r in self.rows if r["stage"] != row["stage"]), row]
        self._mark = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = trainer.log_dir  # all ranks: it is broadcast
        if not self.rows or not trainer.is_global_zero:
            return
        print("\n" + self.table())
        if directory:
            path = Path(directory) / "stages.json"
            path.write_text(json.dumps(self.rows, indent=2, sort_keys=True) + "\n")

    def table(self) -> str:
        """The rows as aligned text; columns that nothing was logged for are left out."""
        shown = [c for c in _COLUMNS if any(c[1] in row for row in self.rows)]
        cells = [[title for title, _, _ in shown]]
        for row in self.rows:
            cells.append([form.format(row[key]) if key in row else "-" for _, key, form in shown])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._mark = None  # writing a checkpoint is not training

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "stage": self._stage,
            "tokens": self._tokens,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._stage = state_dict["rows"], state_dict["stage"]
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]


def _stage(trainer: Trainer) -> int:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c.stage for c in callbacks if isinstance(c, ContextCurriculum)), 0)
