"""Fine-tunes pretrained models with real DeepSpeed engines on two gloo ranks, and exports them.

`python exports.py OUT` imports everything once, forks the ranks, data- and then sequence-parallel
ones, and runs every case of `CASES` in them. OUT/CASE gets the checkpoint `step=2.ckpt`, the export
`huggingface` and, from rank 0, `seen.pt`.
"""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parity import ARCHITECTURE, ATTENTION, BUDGET, Keep, Rows, fork
from pytorch_lightning import Callback, Trainer

from lit_sparse.callbacks import HuggingFaceExport, SparseAttention
from lit_sparse.distributed import DeepSpeedSparseStrategy
from lit_sparse.distributed.weights import whole_tensor
from lit_sparse.models import build_model
from lit_sparse.models.export import stored_tensors
from lit_sparse.training import SparseLM

CASES: dict[str, dict[str, Any]] = {
    # model, stage (None: one process without DeepSpeed), sequence-parallel ranks
    "alone": {"model": "llama", "stage": None},
    "alone-tied": {"model": "qwen3", "stage": None},
    "0": {"model": "llama", "stage": 0},
    "1": {"model": "llama", "stage": 1},
    "2": {"model": "qwen3", "stage": 2},
    "3": {"model": "llama", "stage": 3},
    "3-tied": {"model": "qwen3", "stage": 3},
    "2-sequence": {"model": "llama", "stage": 2, "sequence": 2},
    "3-sequence": {"model": "qwen3", "stage": 3, "sequence": 2},
}


def pretrained(out: Path) -> None:
    """Two models: in one float32 file, and in several bfloat16 ones with tied embeddings."""
    torch.manual_seed(1)
    build_model(architecture=ARCHITECTURE).save_pretrained(out / "llama")
    tied = {**ARCHITECTURE, "model_type": "qwen3", "tie_word_embeddings": True}
    model = build_model(architecture=tied, dtype="bfloat16")
    model.generation_config.eos_token_id = [0, 7]
    model.save_pretrained(out / "qwen3", max_shard_size="8KB")


class See(Callback):
    """The whole weights before and after, and a checkpoint as `RunCheckpoint` leaves it."""

    def __init__(self, out: Path, stage: int | None, sequence: int) -> None:
        self.out, self.sharding = out, {"stage": stage, "data": 2 // sequence, "sequence": sequence}
        self.weights: dict[str, dict[str, Any]] = {}

    def _see(self, trainer: Trainer, module: Any, when: str) -> None:
        found = {n: whole_tensor(t) for n, t in stored_tensors(module.model).items()}
        self.weights[when] = {n: t.clone() for n, t in found.items()}

    def on_fit_start(self, trainer, pl_module):
        self._see(trainer, pl_module, "before")
        self.buffers = dict(pl_module.model.named_buffers())

    def on_train_end(self, trainer, pl_module):
        self._see(trainer, pl_module, "after")
        path = self.out / f"step={trainer.global_step}.ckpt"
        own = {"models": {"model": pl_module.model.config.to_dict()}, "sharding": self.sharding}
        checkpoint = {
            "lit_sparse": own,
            "global_step": trainer.global_step,
            "hyper_parameters": dict(pl_module.hparams),
        }
        if self.sharding["stage"] is None:
            own["sharding"] = None
            torch.save({**checkpoint, "state_dict": pl_module.state_dict()}, path)
            return
        trainer.strategy.deepspeed_engine.save_checkpoint(path, client_state={}, tag="checkpoint")
        if trainer.is_global_zero:
            torch.save(checkpoint, path / "run.ckpt")
            (path / "manifest.json").write_text(json.dumps({}))


def case(name: str, out: Path) -> None:
    wanted = CASES[name]
    stage, sequence = wanted["stage"], wanted.get("sequence", 1)
    torch.manual_seed(0)
    (out / name).mkdir(exist_ok=True)
    keep, see = Keep(), See(out / name, stage, sequence)
    strategy = "auto"
    if stage is not None:
        strategy = DeepSpeedSparseStrategy(stage=stage, sequence_parallel=sequence)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if stage is None else 2,
        strategy=strategy,
        accumulate_grad_batches=2 if sequence == 2 or stage is None else 1,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out / name,
        callbacks=[SparseAttention(BUDGET, **ATTENTION), keep, see, HuggingFaceExport()],
    )
    module = SparseLM(
        pretrained=str(out / wanted["model"]), warmup_steps=0, learning_rate=1e-3, weight_decay=0.5
    )
    trainer.fit(module, datamodule=Rows(2, steps=2))
    if trainer.is_global_zero:
        found = {"gradients": keep.gradients, "buffers": see.buffers, **see.weights}
        torch.save(found, out / name / "seen.pt")


def main(out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pretrained(out)

    def run(wanted: list[str]) -> None:
        for name in wanted:
            case(name, out)

    alone = [name for name, about in CASES.items() if about["stage"] is None]
    split = [name for name, about in CASES.items() if about.get("sequence") == 2]
    fork(1, partial(run, alone))
    fork(2, partial(run, [name for name in CASES if name not in alone and name not in split]))
    fork(2, partial(run, split))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
