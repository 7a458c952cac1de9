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
from parity import ARCHITECTURE
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from runs import (
    COMMON,
    Data,
    Logged,
    PaddedData,
    Passkeys,
    Recorder,
    make_module,
    make_trainer,
    weights,
)

from lit_sparse.callbacks import (
    BudgetController,
    Cockpit,
    CollapseLimits,
    CollapseMonitor,
    ContextCurriculum,
    DenseGapMonitor,
    FiniteGuard,
    StageReport,
    Throughput,
    dense_comparison,
)
from lit_sparse.data import PackedTextDataModule
from lit_sparse.distributed import ranks_of, shard_sequence
from lit_sparse.training import SparseLM, Stage

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork

HEADS = (1, 2)
"""Of the 8, watched by the CollapseMonitor: of ranks that share a row only the first has them."""
CORPUS = [f"def value_{i}(x):\n    return x + {i}\n\n" * 75 for i in range(12)]


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


class Padded(SparseLM):
    """Calls its model with a mask."""

    def validation_step(self, batch, batch_idx):
        self.model(**batch, use_cache=False)


def padded(size: str, stage: str, folder: Path) -> dict[str, Any]:
    """A comparison whose logits have room for 30 tokens, where ranks have unequally many."""
    room, dense_comparison._LOGITS = dense_comparison._LOGITS, 30 * ARCHITECTURE["vocab_size"]
    try:
        trainer = make_trainer(size, stage, [DenseGapMonitor(validation_batches=2)])
        return trainer.validate(make_module(Padded), datamodule=PaddedData(2), verbose=False)[0]
    finally:
        dense_comparison._LOGITS = room


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
    """Where a run ends that an alert stops in the first micro-batch of its first step."""
    limits = CollapseLimits(missed_mass=1e-30)
    monitor = CollapseMonitor(**COMMON, patience=1, limits=limits, on_alert="stop")
    trainer = make_trainer(size, stage, [monitor])
    trainer.fit(make_module(), datamodule=Data(2, steps=5))
    return {"step": trainer.global_step}


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
    "padded": padded,
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
