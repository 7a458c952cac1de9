"""Trains on real ranks and writes down which rows each of them saw, at which optimizer step.

`python ranks.py CORPUS OUT RANKSxWORKERS...` imports everything once and forks the ranks, gloo
processes of Lightning's DDP. OUT/RANKSxWORKERS/RANK.json gets a list of [step, hash of the tokens].
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer

from lit_sparse.data import PackedTextDataModule
from lit_sparse.training.curriculum import Curriculum, Stage

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork


class Recorder(LightningModule):
    """Keeps what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch, batch_idx):
        digest = hashlib.sha256()
        for key in sorted(batch):
            digest.update(batch[key].numpy().tobytes())
        self.seen.append((self.trainer.global_step, digest.hexdigest()))
        return self.weight * batch["input_ids"].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(corpus: str, out: Path, rank: int, world: int, workers: int) -> None:
    data = PackedTextDataModule(
        corpus,
        row_tokens=256,
        rows_per_step=4,
        validation_fraction=0.2,
        tasks={"passkey": 0.5},
        seed=5,
        num_workers=workers,
        curriculum=Curriculum([Stage(64, 3), Stage(256, 3)]),
    )
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=out,
    )
    trainer.fit(model, datamodule=data)
    (out / f"{rank}.json").write_text(json.dumps(model.seen))


def main(corpus: str, out: Path, cases: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for case in cases:
        world, workers = map(int, case.split("x"))
        folder = out / case
        folder.mkdir()

        def run(folder: Path = folder, world: int = world, workers: int = workers) -> None:
            train(corpus, folder, int(os.environ["RANK"]), world, workers)

        fork(world, run)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
