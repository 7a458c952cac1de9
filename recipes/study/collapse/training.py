"""Short fine-tunes from a collapsed start, with and without a mend; each is a run of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch.optim import AdamW

from lit_sparse.budget import Budget
from lit_sparse.callbacks import QKClip, SparseAttention
from lit_sparse.data import PackedTextDataModule
from lit_sparse.data.tokenizer import has_tokenizer
from lit_sparse.models import attention_layers
from lit_sparse.recipes.study.collapse.measure import Measured, Sizes, measure
from lit_sparse.recipes.study.collapse.mends import LengthScaling, scale_logits, with_qk_norm
from lit_sparse.training import Curriculum, SparseLM
from lit_sparse.training.curriculum import Stage

NONE, QK_NORM, QK_CLIP, LENGTH = "no mend", "QK-norm", "QK-clip", "length-scaled"

HEALTHY = "healthy"
ARMS = {
    HEALTHY: (NONE, LENGTH),
    "concentrated": (NONE, QK_NORM, QK_CLIP, LENGTH),
    "high rate": (NONE, QK_NORM, QK_CLIP),
    # QK-clip only ever lowers logits: here it would be no mend, bit for bit.
    "dispersed": (NONE, QK_NORM, LENGTH),
}
"""What is trained: start -> mends. "high rate" starts healthy and trains W_Q and W_K too fast."""


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Args:
        base: directory of the healthy model.
        length: tokens of a piece in training; measured at this and at twice this.
        row_tokens, steps: of the fine-tune; a row a step.
        sizes: of what is measured.
        tasks: half of the pieces of the training carry one of them.
        factors: start -> what its logits are multiplied by; 1 where it is left out.
        threshold: of QK-clip, and the bound of QK-norm at its start: the largest logit of the
            healthy model.
        high_rate: learning rate of W_Q and W_K over that of the rest, where they are trained too
            fast.
        learning_rate: peak of the rest's.
    """

    base: Path
    length: int
    row_tokens: int
    steps: int
    sizes: Sizes
    tasks: Sequence[str]
    factors: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 100.0
    high_rate: float = 30.0
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    start: str
    mend: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What a run came to: by length, before and after it."""

    run: Run
    before: dict[int, Measured]
    after: dict[int, Measured]


class Trained(SparseLM):
    """SparseLM with another learning rate for W_Q and W_K."""

    def __init__(self, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self.rate = rate

    def adamw(self, fused: bool | None = None) -> AdamW:
        """See `SparseLM.adamw`."""
        optimizer = super().adamw(fused)
        if self.rate != 1:
            group = optimizer.param_groups[0]
            own = {
                id(projection.weight)
                for _, module in attention_layers(self.model)
                for projection in (cast(Any, module).q_proj, cast(Any, module).k_proj)
            }
            fast = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            rest = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": fast, "lr": self.rate * group["lr"]})
        return optimizer


def all_runs(seeds: list[int]) -> list[Run]:
    """Every arm of every start, seed by seed."""
    return [
        Run(start, mend, seed) for seed in seeds for start, mends in ARMS.items() for mend in mends
    ]


def fine_tune(plan: Plan, run: Run) -> Result:
    """Train one arm and measure it before and after. One thread; the same on every call."""
    torch.set_num_threads(1)
    seed_everything(run.seed, verbose=False)
    module = Trained(
        plan.high_rate if run.start == "high rate" else 1,
        pretrained=str(plan.base),
        learning_rate=plan.learning_rate,
        warmup_steps=plan.steps // 20,
    )
    module.configure_model()
    scale_logits(module.model, plan.factors.get(run.start, 1.0))
    callbacks: list[Callback] = [SparseAttention(Budget.dense())]
    if run.mend == QK_NORM:
        module.model = with_qk_norm(module.model, plan.threshold)
    elif run.mend == LENGTH:
        LengthScaling(module.model, plan.length)
    elif run.mend == QK_CLIP:
        callbacks.append(QKClip(plan.threshold))
    data = datamodule(plan, run.seed)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    data.setup()
    probes = [
        plan.sizes.draw(data.validation_text, data.text_tokenizer, length, plan.tasks, run.seed)
        for length in (plan.length, 2 * plan.length)
    ]
    before = {probe.length: measure(module.model, probe) for probe in probes}
    module.model.train()
    trainer.fit(module, datamodule=data)
    return Result(run, before, {probe.length: measure(module.model, probe) for probe in probes})


def train_all(plan: Plan, runs: Sequence[Run], progress: Callable[[str], None]) -> list[Result]:
    """All runs, two at a time, each in a process of one thread; in the order of `runs`."""
    for seed in {run.seed for run in runs}:
        datamodule(plan, seed).setup()  # packed here, once, and not by two processes
    found = []
    # Not forked: torch may have started threads.
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_quiet) as pool:
        for number, result in enumerate(pool.map(partial(fine_tune, plan), runs), start=1):
            run, after = result.run, result.after[plan.length]
            progress(
                f"run {number} of {len(runs)}, {run.start}, {run.mend}, seed {run.seed}: answers "
                f"{result.before[plan.length].accuracy:.0%}, then {after.accuracy:.0%}"
            )
            found.append(result)
    return found


def datamodule(plan: Plan, seed: int) -> PackedTextDataModule:
    """Python source, half of whose pieces carry a task; the seed draws the files that are
    held out, the order, and what is planted.
    """
    return PackedTextDataModule(
        path="stdlib",
        tokenizer=str(plan.base) if has_tokenizer(plan.base) else "bytes",
        row_tokens=plan.row_tokens,
        tasks=dict.fromkeys(plan.tasks, 0.5 / len(plan.tasks)),
        task_recalls=4,
        curriculum=Curriculum([Stage(length=plan.length, steps=plan.steps)]),
        seed=seed,
    )


def _quiet() -> None:
    """Of a process of the pool: `progress` says what there is to say."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
