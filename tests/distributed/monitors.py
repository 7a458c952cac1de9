"""Runs callbacks on real DeepSpeed engines and real gloo ranks, and writes down what they found.

`python monitors.py OUT SIZE:CASE@STAGE,...` imports everything once and forks the ranks of each
SIZE, DATAxSEQUENCE (1x1: one process, Lightning's default strategy), which run its cases one after
the other. OUT/SIZE/CASE@STAGE/RANK.pt gets what the rank found. A STAGE is of ZeRO, or 2_offload.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parity import ARCHITECTURE, ATTENTION, BUDGET, Rows, fork, rows
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lit_sparse.callbacks import (
    BudgetController,
    Cockpit,
    CollapseLimits,
    CollapseMonitor,
    ContextCurriculum,
    DenseGapMonitor,
    FiniteGuard,
    PasskeyEval,
    SparseAttention,
    StageReport,
    Throughput,
)
from lit_sparse.data import PackedTextDataModule
from lit_sparse.distributed import DeepSpeedSparseStrategy, ranks_of, shard_sequence
from lit_sparse.distributed.gradients import engine_of
from lit_sparse.training import SparseLM, Stage

ROWS = 8
"""Sampled rows of all ranks."""
COMMON = {"every_n_steps": 1, "rows": ROWS, "min_context": 16}
HEADS = (1, 2)
"""Of the 8, watched by the CollapseMonitor: of ranks that share a row only the first has them."""
CORPUS = [f"def value_{i}(x):\n    return x + {i}\n\n" * 75 for i in range(12)]


class Data(Rows):
    """With four rows to validate on, of which each data-parallel rank takes its share."""

    labels = True

    def val_dataloader(self):
        ranks, found = ranks_of(self.trainer), rows(4, seed=7)
        share = len(found) // ranks.data_size
        own = found[ranks.data_rank * share : (ranks.data_rank + 1) * share]
        for row in own if not self.labels else []:
            del row["labels"]
        return DataLoader(own, batch_size=None)


class Recorder(DenseGapMonitor):
    """Keeps what it measured."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.samples: list[Any] = []
        self.gaps: list[Any] = []

    def finish(self, trainer, pl_module, sample):
        super().finish(trainer, pl_module, sample)
        self.samples.append(sample)

    def _judge(self, trainer, pl_module, gap):
        super()._judge(trainer, pl_module, gap)
        self.gaps.append(gap)


class Logged(Callback):
    """Keeps what each optimizer step logged, and the last validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, pl_module):
        self.last = {k: float(v) for k, v in trainer.callback_metrics.items()}


def make_trainer(size: str, stage: str, callbacks: list[Callback], **options: Any) -> Trainer:
    """Of a rank: two rows a step, of two data-parallel ranks or accumulated."""
    data_size, sequence_size = map(int, size.split("x"))
    strategy: Any = "auto"
    if size != "1x1":
        offload = "cpu" if stage.endswith("offload") else None
        strategy = DeepSpeedSparseStrategy(int(stage[0]), sequence_size, offload_optimizer=offload)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": data_size * sequence_size,
        "strategy": strategy,
        "accumulate_grad_batches": 2 // data_size,
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [SparseAttention(BUDGET, **ATTENTION), *callbacks],
    }
    return Trainer(**settings | options)


def make_module(kind: type[SparseLM] = SparseLM, **options: Any) -> SparseLM:
    torch.manual_seed(0)
    return kind(**{"architecture": ARCHITECTURE, "warmup_steps": 0, **options})


def weights(trainer: Trainer, module: SparseLM) -> torch.Tensor:
    """All weights; asks all ranks where they are sharded."""
    engine = engine_of(trainer)
    parameters = list(module.parameters())
    if engine is not None and engine.zero_optimization():
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = [safe_get_full_fp32_param(p) for p in parameters]
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def watch(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """All monitors look on while weights hardly move, so that every size has the same ones."""
    gap = Recorder(**COMMON, compare_every=1, validation_batches=4)
    alerts: list[str] = []
    # No range of logits holds all but so little of the mass: an alert for every layer.
    collapse = CollapseMonitor(
        **COMMON,
        heads=HEADS,
        patience=1,
        limits=CollapseLimits(missed_mass=1e-9),
        on_alert=lambda trainer, alert: alerts.append(str(alert)),
    )
    throughput, logged = Throughput(), Logged()
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    callbacks = [gap, collapse, FiniteGuard(), throughput, Cockpit(), logged]
    trainer = make_trainer(size, stage, callbacks, logger=logger)
    trainer.fit(make_module(warmup_steps=10**8), datamodule=Data(2, steps=2))
    return {
        "samples": [_plain(sample) for sample in gap.samples],
        "sums": gap.gaps[-1].sums,
        "documents": gap.gaps[-1].documents,
        "steps": logged.steps,
        "last": logged.last,
        "alerts": alerts,
        "tokens": throughput.state_dict()["recent"][0][0],
    }


def _plain(sample: Any) -> dict[str, Any]:
    return {
        "layers": {
            layer: {name: getattr(found, name) for name in ("context", "tau", "entropy", "recall")}
            for layer, found in sample.layers.items()
        },
        "error": sample.stack("output_error"),
        "similarity": dict(sample.similarity),
        "budgets": dict(sample.budgets),
        "heads": sample.heads,
    }


class Own(SparseLM):
    """Calls its model without lengths of documents and labels."""

    def validation_step(self, batch, batch_idx):
        part = shard_sequence(batch, ranks_of(self.trainer))
        self.model(input_ids=part["input_ids"], position_ids=part["position_ids"], use_cache=False)


def own(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """What a comparison finds in a validation alone, of rows without labels."""
    trainer = make_trainer(size, stage, [DenseGapMonitor(validation_batches=4)])
    data = Data(2)
    data.labels = False
    return trainer.validate(make_module(Own), datamodule=data, verbose=False)[0]


def unchanged(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """The weights of a run without monitors, and of one with them."""
    found = {}
    for name in ("without", "with"):
        monitors = [
            DenseGapMonitor(**COMMON, compare_every=1),
            CollapseMonitor(**COMMON),
            FiniteGuard(),
            Throughput(),
        ]
        trainer = make_trainer(size, stage, monitors if name == "with" else [])
        module = make_module(learning_rate=1e-2)
        trainer.fit(module, datamodule=Data(2, steps=3))
        found[name] = weights(trainer, module)
    return found


class Breaks(SparseLM):
    """On the last rank, in steps 1 to 3, something is not finite: the loss, a gradient that passes
    layer 1, the output of layer 0.
    """

    def training_step(self, batch, batch_idx):
        trainer, layers = self.trainer, self.model.model.layers
        last = trainer.global_rank == trainer.world_size - 1
        step, hook = trainer.global_step if last else None, None
        if step == 2:
            hook = layers[1].self_attn.v_proj.register_forward_hook(
                lambda _, args, output: output.register_hook(lambda grad: grad * math.nan) and None
            )
        elif step == 3:
            hook = layers[0].mlp.register_forward_hook(lambda _, args, output: output * math.inf)
        loss = super().training_step(batch, batch_idx)
        if hook is not None:
            hook.remove()
        return loss * math.nan if step == 1 else loss


def guard(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """What FiniteGuard says, and the weights after each step."""
    alerts, after, logged = [], [], Logged()

    class Weights(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if not trainer.fit_loop._should_accumulate():
                after.append(weights(trainer, pl_module))

    guard = FiniteGuard(on_alert=lambda trainer, alert: alerts.append((alert.step, alert.what)))
    trainer = make_trainer(size, stage, [guard, Weights(), logged])
    trainer.fit(make_module(Breaks), datamodule=Data(2, steps=5))
    thrown = logged.steps[-1]["train/steps_not_finite"]
    return {"alerts": alerts, "weights": after, "thrown": thrown}


def stop(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """Where a run ends that an alert stops in the first micro-batch of its second step."""
    limits = CollapseLimits(missed_mass=1e-9)
    monitor = CollapseMonitor(**COMMON, patience=2, limits=limits, on_alert="stop")
    trainer = make_trainer(size, stage, [monitor])
    trainer.fit(make_module(), datamodule=Data(2, steps=5))
    return {"step": trainer.global_step}


class Passkeys(PasskeyEval):
    """Keeps each first choice of the model."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.chosen: list[list[int]] = []

    def on_validation_epoch_end(self, trainer, pl_module):
        def keep(_, args, logits):
            self.chosen.append(logits.argmax(-1).flatten().tolist())

        hook = pl_module.model.lm_head.register_forward_hook(keep)
        super().on_validation_epoch_end(trainer, pl_module)
        hook.remove()


def recall(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """Two stages with RoPE by rule, a controller and passkeys, on text."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, text in enumerate(CORPUS):
        (corpus / f"{i:02d}.py").write_text(text)
    stages = [Stage(128, 2, rope={"rule": "yarn"}), Stage(256, 2, rope={"rule": "yarn"})]
    curriculum = ContextCurriculum(stages)
    data = PackedTextDataModule(
        str(corpus),
        row_tokens=256,
        rows_per_step=2,
        validation_rows=2,
        validation_fraction=0.2,
        curriculum=curriculum.curriculum,
        cache_dir=str(folder / f"cache{os.environ['RANK']}"),
    )
    controller = BudgetController(0.05, **COMMON, patience=1, up=2.0)
    logged, passkeys, report = Logged(), Passkeys(prompts=2), StageReport()
    callbacks = [curriculum, controller, passkeys, logged, report]
    trainer = make_trainer(size, stage, callbacks, max_epochs=-1, default_root_dir=folder)
    short = {**ARCHITECTURE, "vocab_size": 257, "max_position_embeddings": 64}
    module = make_module(architecture=short, learning_rate=1e-3)
    trainer.fit(module, datamodule=data)
    return {"steps": logged.steps, "last": logged.last, "chosen": passkeys.chosen}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "watch": watch,
    "own": own,
    "unchanged": unchanged,
    "guard": guard,
    "stop": stop,
    "recall": recall,
}


def main(out: Path, sizes: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for entry in sizes:
        size, _, cases = entry.partition(":")

        def run(size: str = size, cases: str = cases) -> None:
            for case in cases.split(","):
                name, stage = case.split("@")
                folder = out / size / case
                folder.mkdir(parents=True, exist_ok=True)
                found = CASES[name](size, stage, folder)
                torch.save(found, folder / f"{os.environ['RANK']}.pt")

        fork(math.prod(map(int, size.split("x"))), run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
