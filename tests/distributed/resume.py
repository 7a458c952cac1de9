"""Stops and continues runs with real DeepSpeed engines on real gloo ranks.

`python resume.py DATAxSEQUENCE OUT CASE...` forks the ranks, which run each case one after the
other: a whole run of four steps with checkpoints, the same run continued from its second step, and
validations from its last one. A case is a JSON object, see `Case`. Rank 0 writes OUT/CASE.pt.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from parity import ARCHITECTURE, ATTENTION, BUDGET, Rows, fork
from pytorch_lightning import Callback, LightningDataModule, Trainer

from lit_sparse.callbacks import RunCheckpoint, SparseAttention, StepSeed
from lit_sparse.distributed import DeepSpeedSparseStrategy, ranks_of
from lit_sparse.distributed.checkpoint import full_state_dict
from lit_sparse.training import SparseLM

STEPS = 4


@dataclass(frozen=True)
class Case:
    """What differs between runs."""

    stage: int = 2
    accumulate: int = 1
    offload: bool = False
    precision: str = "32-true"
    tied: bool = False


class Steps:
    """A loader that can say how many of its batches it has given, and start behind them."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.given, self.start = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        self.given, self.start = self.start, 0
        return self

    def __next__(self):
        if self.given == len(self.batches):
            raise StopIteration
        self.given += 1
        return self.batches[self.given - 1]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state_dict):
        self.start = state_dict["given"]


class Data(LightningDataModule):
    """Rows to train on, which a resumed run goes on with, and rows to validate on."""

    def __init__(self, rows_per_step: int) -> None:
        super().__init__()
        self.rows_per_step = rows_per_step

    def train_dataloader(self):
        rows = Rows(self.rows_per_step, STEPS)
        rows.trainer = self.trainer
        return Steps(list(rows.train_dataloader()))

    def val_dataloader(self):
        ranks = ranks_of(self.trainer)
        rows = Rows(4, seed=1).rows[2:]
        return Steps([{**row} for row in rows[ranks.data_rank :: ranks.data_size]])


class Watch(Callback):
    """Remembers what each optimizer step showed."""

    def __init__(self) -> None:
        self.shown: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
            groups = trainer.optimizers[0].param_groups
            self.shown.append({**shown, "step": trainer.global_step, "lr": groups[0]["lr"]})


def trainer_of(case: Case, data_size: int, sequence_size: int, out: Path, *callbacks: Callback):
    device = "cpu" if case.offload else None
    strategy = DeepSpeedSparseStrategy(
        stage=case.stage,
        sequence_parallel=sequence_size,
        offload_optimizer=device,
        offload_parameters=device if case.stage == 3 else None,
    )
    return Trainer(
        accelerator="cpu",
        devices=data_size * sequence_size,
        strategy=strategy,
        precision=case.precision,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=0.5,
        max_epochs=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SparseAttention(BUDGET, **ATTENTION), StepSeed(1), *callbacks],
    )


def module_of(case: Case, seed: int) -> SparseLM:
    torch.manual_seed(seed)
    architecture = {**ARCHITECTURE, "tie_word_embeddings": case.tied}
    return SparseLM(architecture=architecture, warmup_steps=2, learning_rate=1e-2)


class Weights(Callback):
    """Keeps the whole weights at the end of training, and leaves them as a file besides."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer, pl_module):
        self.found = full_state_dict(trainer.strategy.deepspeed_engine)
        if self.path is not None:
            trainer.save_checkpoint(self.path, weights_only=True)


def run(case: Case, data_size: int, sequence_size: int, out: Path) -> dict[str, Any]:
    sizes = data_size, sequence_size

    def fit(seed: int, out: Path, path: Path | None = None):
        watch, weights = Watch(), Weights(out / "full.ckpt" if path is None else None)
        saving = RunCheckpoint(every_n_steps=2, keep=9)
        trainer = trainer_of(case, *sizes, out, weights, watch, saving)
        data = Data(data_size * case.accumulate)
        trainer.fit(module_of(case, seed), datamodule=data, ckpt_path=path)
        return {"shown": watch.shown, "weights": weights.found}

    def validate(path: Path):
        trainer = trainer_of(case, *sizes, out)
        data = Data(data_size * case.accumulate)
        (found,) = trainer.validate(
            module_of(case, 2), datamodule=data, ckpt_path=path, verbose=False
        )
        return found["val/loss"]

    whole, again = out / "whole", out / "again"
    result = {
        "whole": fit(0, whole),
        "continued": fit(1, again, whole / "checkpoints" / "step=2.ckpt"),
        "validated": {
            "shards": validate(whole / "checkpoints" / "step=4.ckpt"),
            "file": validate(whole / "full.ckpt"),
        },
    }
    return result


def main(size: str, out: Path, cases: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data_size, sequence_size = map(int, size.split("x"))

    def child() -> None:
        for text in cases:
            case = Case(**json.loads(text))
            name = "_".join(str(value) for value in asdict(case).values())
            found = run(case, data_size, sequence_size, out / name)
            if os.environ["RANK"] == "0":
                torch.save(found, out / f"{name}.pt")

    fork(data_size * sequence_size, child)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
