"""Stops and continues runs with real DeepSpeed engines on real gloo ranks.

`python resume.py OUT CASE...` forks ranks for the cases, JSON objects, see `Case`: a whole run of
four steps with checkpoints in OUT/NAME, the same run continued from its second step, and
validations from its last one. Rank 0 writes OUT/NAME.pt. The ranks of the last case then try what
has to be refused, OUT/refused.pt, and run once more into OUT/killed, where one dies while it
writes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity import ARCHITECTURE, ATTENTION, BUDGET, Rows
from pytorch_lightning import Callback, LightningDataModule, Trainer

from lit_sparse.callbacks import RunCheckpoint, SparseAttention, StepSeed
from lit_sparse.distributed import DeepSpeedSparseStrategy, ranks_of
from lit_sparse.distributed.weights import full_state_dict
from lit_sparse.training import SparseLM
from lit_sparse.training.checkpoint import newest_whole

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork, import_for_ranks

STEPS = 4


@dataclass(frozen=True)
class Case:
    """What differs between runs."""

    name: str
    data: int = 2
    sequence: int = 1
    stage: int = 2
    accumulate: int = 1
    offload: bool = False
    precision: str = "32-true"
    tied: bool = False
    frozen: bool = False

    @property
    def ranks(self) -> int:
        return self.data * self.sequence


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


class Weights(Callback):
    """Keeps the whole weights at the end of training, and leaves them as a file besides."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer, pl_module):
        self.found = full_state_dict(trainer.strategy.deepspeed_engine)
        if self.path is not None:
            trainer.save_checkpoint(self.path, weights_only=True)


class Runs:
    """Trainings and validations of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def strategy(self) -> DeepSpeedSparseStrategy:
        case, device = self.case, "cpu" if self.case.offload else None
        return DeepSpeedSparseStrategy(
            stage=case.stage,
            sequence_parallel=case.sequence,
            offload_optimizer=device,
            offload_parameters=device if case.stage == 3 else None,
        )

    def trainer(self, strategy: Any, out: Path, *callbacks: Callback) -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1 if strategy == "auto" else self.case.ranks,
            strategy=strategy or self.strategy(),
            precision=self.case.precision,
            accumulate_grad_batches=self.case.accumulate,
            gradient_clip_val=0.5,
            max_epochs=1,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            default_root_dir=out,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[SparseAttention(BUDGET, **ATTENTION), StepSeed(1), *callbacks],
        )

    def module(self, seed: int) -> SparseLM:
        torch.manual_seed(seed)
        architecture = {**ARCHITECTURE, "tie_word_embeddings": self.case.tied}
        module = SparseLM(architecture=architecture, warmup_steps=2, learning_rate=1e-2)
        module.model.get_input_embeddings().requires_grad_(not self.case.frozen)
        return module

    @property
    def data(self) -> Data:
        return Data(self.case.data * self.case.accumulate)

    def fit(self, seed: int, out: Path, start: Path | None = None, strategy: Any = None):
        watch, weights = Watch(), Weights(None if start else out / "full.ckpt")
        saving = RunCheckpoint(every_n_steps=2, keep=9)
        trainer = self.trainer(strategy, out, weights, watch, saving)
        trainer.fit(self.module(seed), datamodule=self.data, ckpt_path=start)
        return {"shown": watch.shown, "weights": weights.found}

    def validate(self, path: Path, strategy: Any = None) -> float:
        trainer = self.trainer(strategy, path.parent)
        (found,) = trainer.validate(
            self.module(2), datamodule=self.data, ckpt_path=path, verbose=False
        )
        return found["val/loss"]

    def all(self, out: Path) -> dict[str, Any]:
        whole = out / "whole"
        found = {
            "whole": self.fit(0, whole),
            "continued": self.fit(1, out / "again", whole / "checkpoints" / "step=2.ckpt"),
            "validated": {
                "shards": self.validate(whole / "checkpoints" / "step=4.ckpt"),
                "file": self.validate(whole / "full.ckpt"),
            },
        }
        if self.case.sequence == 1:
            found["validated"]["ddp"] = self.validate(whole / "full.ckpt", "ddp")
        return found


class Code:
    """What a file of somebody else's may hold: loaded as it stands, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def poison(checkpoint: Path, copy: Path, mark: Path) -> None:
    shutil.copytree(checkpoint, copy)
    for shard in copy.rglob("*optim_states.pt"):
        torch.save({"optimizer_state_dict": Code(mark)}, shard)


def refused(runs: Runs, starts: dict[str, Path], out: Path) -> dict[str, str]:
    """The errors of fits that must not begin; that from "stage" is of another stage."""
    errors = {}
    for name, start in starts.items():
        strategy = DeepSpeedSparseStrategy(stage=1) if name == "stage" else None
        try:
            runs.fit(1, out / "refused", start, strategy)
        except ValueError as error:
            errors[name] = str(error)
    return errors


def killed(runs: Runs, out: Path) -> None:
    """A whole run of which rank 0 dies while it writes its last checkpoint."""
    save = torch.save

    def die(state: Any, file: Any) -> None:
        save(state, file)
        if state.get("global_step") == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "0":
        torch.save = die
    runs.fit(0, out)


def main(out: Path, cases: list[Case]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import_for_ranks()

    def write(found: Any, name: str) -> None:
        if os.environ["RANK"] == "0":
            torch.save(found, out / f"{name}.pt")

    def each(group: list[Case]) -> None:
        for case in group:
            write(Runs(case).all(out / case.name), case.name)

    for ranks, group in itertools.groupby(cases, lambda case: (case.data, case.sequence)):
        fork(math.prod(ranks), partial(each, list(group)))
    for case in cases:
        alone = Runs(case).validate(out / case.name / "whole" / "full.ckpt", "auto")
        torch.save(alone, out / f"{case.name}.alone.pt")

    runs = Runs(case)
    whole = out / case.name / "whole"
    starts = {
        "stage": whole / "checkpoints" / "step=2.ckpt",
        "file": whole / "full.ckpt",
        "code": out / "poisoned.ckpt",
    }
    poison(starts["stage"], starts["code"], out / "code_ran")
    fork(case.ranks, lambda: write(refused(runs, starts, out), "refused"))

    folder = out / "killed" / "checkpoints"
    with contextlib.suppress(SystemExit):
        fork(case.ranks, lambda: killed(runs, out / "killed"))
    torch.save(sorted(path.name for path in folder.iterdir()), out / "left.pt")
    fork(case.ranks, lambda: write(runs.fit(1, out / "killed", newest_whole(folder)), "after"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Case(**json.loads(text)) for text in sys.argv[2:]])
