"""Trains adapters on pretrained models with real DeepSpeed engines on two gloo ranks.

`python lora.py OUT CASE ...` imports everything once, forks the ranks, and runs cases of `CASES` in
them: two steps with a checkpoint after each in OUT/CASE, and the second one again from the first
checkpoint in OUT/CASE/again. Rank 0 leaves `seen.pt` in both, and for case 3, in `refused.txt`, why
other adapters cannot go on from there.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from exports import pretrained
from parity import Rows, plugin
from pytorch_lightning import Callback, Trainer
from resume import Steps

from lit_sparse.callbacks import (
    CollapseMonitor,
    FiniteGuard,
    HuggingFaceExport,
    RunCheckpoint,
    StepSeed,
)
from lit_sparse.distributed import DeepSpeedSparseStrategy
from lit_sparse.distributed.gradients import gradients_are_whole
from lit_sparse.distributed.weights import whole_tensor
from lit_sparse.models.lora.adapters import LoRA
from lit_sparse.training import SparseLM

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork, import_for_ranks

MEMORY = {"activations": "offload", "tiled_mlp": 3, "loss": "tiled", "loss_chunk": 50}
CASES: dict[str, dict[str, Any]] = {
    # stage None: one process without DeepSpeed, with the same rows
    "alone": {"stage": None},
    "ddp": {"stage": None, "ranks": 2},
    "1": {"stage": 1},
    "2": {"stage": 2, "memory": True},
    "3": {"stage": 3},
    "3-memory": {"stage": 3, "memory": True},
    "3-bfloat16": {"stage": 3, "precision": "bf16-true"},
    "3-sequence": {"stage": 3, "sequence": 2},
}
ALL = LoRA(rank=4, targets="all-linear", train_norms=True, train_embeddings=True)


class Data(Rows):
    def train_dataloader(self):
        return Steps(list(super().train_dataloader().dataset))


class Started(SparseLM):
    """Its adapters' B are not 0, where A would get no gradient."""

    def configure_model(self) -> None:
        super().configure_model()
        draw = torch.Generator().manual_seed(3)
        for name, weight in self.model.named_parameters():
            if ".lora_B." in name:
                noise = torch.randn(weight.shape, generator=draw, dtype=torch.float32)
                weight.data.copy_(0.3 * noise)


class Watch(Callback):
    """The whole weights that train, before and after, and their gradients in the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"gradients": {}}

    def _weights(self, module: Any) -> dict[str, Any]:
        named = module.named_parameters()
        return {n: whole_tensor(p).clone() for n, p in named if p.requires_grad}

    def on_fit_start(self, trainer, pl_module):
        self.found["before"] = self._weights(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and trainer.global_step == 0:
                whole = gradients_are_whole(trainer)
                found = parameter.grad if whole else safe_get_full_grad(parameter)
                self.found["gradients"][name] = found.detach().float().clone()

    def on_train_end(self, trainer, pl_module):
        self.found["after"] = self._weights(pl_module)
        self.found["norm"] = float(trainer.callback_metrics["train/grad_norm"])


def fit(about: dict[str, Any], out: Path, start: Path | None = None, lora: LoRA = ALL) -> None:
    sequence, ranks = about.get("sequence", 1), about.get("ranks", 2 if about["stage"] else 1)
    strategy = "auto" if ranks == 1 else "ddp"
    if about["stage"] is not None:
        strategy = DeepSpeedSparseStrategy(about["stage"], sequence, timeout_minutes=2)
    watch = Watch()
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        precision=about.get("precision", "32-true"),
        accumulate_grad_batches=2 * sequence // ranks,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[
            plugin(),
            StepSeed(1),
            watch,
            FiniteGuard(),
            CollapseMonitor(every_n_steps=1),
            RunCheckpoint(1),
            HuggingFaceExport(),
        ],
    )
    module = Started(
        pretrained=str(out.parents[bool(start)] / "qwen3"),
        lora=lora,
        warmup_steps=0,
        learning_rate=1e-2,
        **(MEMORY if about.get("memory") else {}),
    )
    trainer.fit(module, datamodule=Data(2, steps=2), ckpt_path=start)
    if trainer.is_global_zero:
        torch.save(watch.found, out / "seen.pt")


def case(name: str, out: Path) -> None:
    about = CASES[name]
    fit(about, out / name)
    start = out / name / "checkpoints" / "step=1.ckpt"
    fit(about, out / name / "again", start)
    if name == "3":
        try:
            fit(about, out / name / "other", start, LoRA(rank=2))
        except ValueError as error:
            (out / name / "refused.txt").write_text(str(error))


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
            if ranks == CASES[name].get("ranks", 2 if CASES[name]["stage"] else 1)
            and sequence == CASES[name].get("sequence", 1)
        ]
        if chosen:
            fork(ranks, lambda chosen=chosen: [case(name, out) for name in chosen])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
