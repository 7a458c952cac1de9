"""Fine-tunes pretrained models with real DeepSpeed engines on two gloo ranks, and exports them.

`python exports.py OUT CASE ...` imports everything once, forks the ranks, and runs cases of `CASES`
in them. OUT/CASE gets the checkpoint `step=2.ckpt`, the export `huggingface` and, from rank 0,
`seen.pt`; where the export fails, RANK.txt is what each rank says.
"""

from __future__ import annotations

import resource
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parity import ARCHITECTURE, BUDGET, Keep, Rows, plugin
from pytorch_lightning import Callback, Trainer

from lit_sparse.callbacks import HuggingFaceExport, RunCheckpoint
from lit_sparse.distributed import DeepSpeedSparseStrategy
from lit_sparse.distributed.weights import whole_tensor
from lit_sparse.models import build_model, law_of, set_budget, set_rope
from lit_sparse.models.export.write import stored_tensors
from lit_sparse.training import SparseLM

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork, import_for_ranks

CASES: dict[str, dict[str, Any]] = {
    # stage None: one process without DeepSpeed, with the same rows
    "alone": {"model": "llama", "stage": None},
    "alone-tied": {"model": "qwen3", "stage": None},
    "0": {"model": "llama", "stage": 0},
    "1": {"model": "llama", "stage": 1},
    "2-tied": {"model": "qwen3", "stage": 2},
    "3": {"model": "llama", "stage": 3},
    "3-tied": {"model": "qwen3", "stage": 3},
    "3-bfloat16": {"model": "llama", "stage": 3, "precision": "bf16-true"},
    "3-full-disk": {"model": "llama", "stage": 3},
    "2-sequence": {"model": "llama", "stage": 2, "sequence": 2},
    "3-sequence-tied": {"model": "qwen3", "stage": 3, "sequence": 2},
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
    """The whole weights before and after, and what else the model was."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def _weights(self, module: Any) -> dict[str, Any]:
        tensors = stored_tensors(module.model)
        return {name: whole_tensor(tensor).clone() for name, tensor in tensors.items()}

    def on_fit_start(self, trainer, pl_module):
        self.found["before"] = self._weights(pl_module)
        self.found["buffers"] = dict(pl_module.model.named_buffers())

    def on_train_start(self, trainer, pl_module):
        # As a stage of a curriculum does.
        set_rope(pl_module.model, rope_theta=500.0)
        set_budget(pl_module.model, replace(BUDGET, sink=16))

    def on_train_end(self, trainer, pl_module):
        self.found["after"] = self._weights(pl_module)
        self.found["law"] = law_of(pl_module.model).to_dict()


class FillDisk(Callback):
    """Rank 0 can write no file of more than 20 kB: configs, but not the weights."""

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def case(name: str, out: Path) -> None:
    about = CASES[name]
    stage, sequence = about["stage"], about.get("sequence", 1)
    (out / name).mkdir(exist_ok=True)
    torch.manual_seed(0)
    keep, see, checkpoint = Keep(), See(), RunCheckpoint(None, dirpath=str(out / name))
    callbacks = [plugin(), keep, see, checkpoint, HuggingFaceExport()]
    if name == "3-full-disk":
        callbacks.insert(-1, FillDisk())
    strategy = "auto"
    if stage is not None:
        strategy = DeepSpeedSparseStrategy(stage, sequence, timeout_minutes=2)
    data_size = 1 if stage is None else 2 // sequence
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if stage is None else 2,
        strategy=strategy,
        precision=about.get("precision", "32-true"),
        accumulate_grad_batches=2 // data_size,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out / name,
        callbacks=callbacks,
    )
    module = SparseLM(
        pretrained=str(out / about["model"]), warmup_steps=0, learning_rate=1e-3, weight_decay=0.5
    )
    try:
        trainer.fit(module, datamodule=Rows(2, steps=2))
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (out / name / f"{trainer.global_rank}.txt").write_text(str(error))
    if trainer.is_global_zero:
        torch.save({**see.found, "gradients": keep.gradients}, out / name / "seen.pt")


def main(out: Path, names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import_for_ranks()
    fork(1, lambda: pretrained(out))  # threads of PyTorch do not survive a fork
    # A process has sequence-parallel groups of one size.
    for ranks, sequence in ((1, 1), (2, 1), (2, 2)):
        chosen = [
            name
            for name in names
            if ranks == (1 if CASES[name]["stage"] is None else 2)
            and sequence == CASES[name].get("sequence", 1)
        ]
        if chosen:
            fork(ranks, lambda chosen=chosen: [case(name, out) for name in chosen])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
