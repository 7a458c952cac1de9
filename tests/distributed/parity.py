"""Trains with real DeepSpeed engines on real gloo ranks, and writes down gradients.

`python parity.py DATAxSEQUENCE OUT` imports everything once, forks the ranks and runs every case in
them, see `measure`. Rank 0 writes OUT, a torch file.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lit_sparse import Budget
from lit_sparse.callbacks import SparseAttention
from lit_sparse.distributed import DeepSpeedSparseStrategy, ranks_of
from lit_sparse.distributed.gradients import gradients_are_whole
from lit_sparse.models import whole_sequences
from lit_sparse.training import SparseLM

sys.path.append(str(Path(__file__).parents[1]))
from forking import fork, import_for_ranks

ROW_TOKENS = 256
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": ROW_TOKENS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
BUDGET = Budget(alpha=5.0, exponent=0.5, floor=48, sink=8)
ATTENTION = {"block": 8, "tile": 16}
MEMORY = {"activations": "offload", "tiled_mlp": 3, "loss": "tiled", "loss_chunk": 50}
"""All of the libraries' memory features."""
MEMORY_CASES = [(0, True), (1, True), (2, True), (2, False), (3, True), (3, False)]
"""Stage, and whether embedding and head share their weight: it has two gradients to wait for."""
CASES = [(stage, accumulate) for stage in (0, 1, 2, 3) for accumulate in (1, 4)]


def rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Packed rows of documents of unequal lengths with unequal numbers of labels. The first half of
    the first row and the whole second row have none: a rank has nothing to learn there.
    """
    made = []
    for number in range(count):
        draw = torch.Generator().manual_seed(1000 * seed + number)
        ids = torch.randint(1, 64, (1, ROW_TOKENS), generator=draw)
        cuts = torch.randperm(ROW_TOKENS - 1, generator=draw)[: 1 + number % 3].sort().values + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
        places = torch.arange(ROW_TOKENS)
        positions = places - starts[torch.bucketize(places, starts, right=True) - 1]
        labels = torch.full_like(ids, -100)
        labels[0, :-1] = torch.where(positions[1:] > 0, ids[0, 1:], -100)
        labels[0, torch.rand(ROW_TOKENS, generator=draw) < 0.1 * (number % 4)] = -100
        if number == 0:
            labels[:, : ROW_TOKENS // 2] = -100
        if number == 1:
            labels[:] = -100
        made.append({"input_ids": ids, "position_ids": positions[None], "labels": labels})
    return made


class Rows(LightningDataModule):
    """The rows of `steps` optimizer steps, of which each data-parallel rank takes its share."""

    def __init__(self, rows_per_step: int, steps: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.rows_per_step, self.steps = rows_per_step, steps
        self.rows = rows(rows_per_step * steps, seed)

    def train_dataloader(self):
        ranks = ranks_of(self.trainer)
        share = self.rows_per_step // ranks.data_size
        found = []
        for step in range(self.steps):
            first = step * self.rows_per_step
            whole = self.rows[first : first + self.rows_per_step]
            tokens = torch.tensor(sum(int((row["labels"] != -100).sum()) for row in whole))
            own = whole[ranks.data_rank * share : (ranks.data_rank + 1) * share]
            found += [{**row, "step_tokens": tokens} for row in own]
        return DataLoader(found, batch_size=None)


class Keep(Callback):
    """Keeps the whole gradients of the first step, before clipping, what each micro-batch returned,
    and each step's numbers.
    """

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        from deepspeed.utils import safe_get_full_grad

        if trainer.global_step == 0:
            whole = gradients_are_whole(trainer)
            for name, parameter in pl_module.named_parameters():
                found = parameter.grad if whole else safe_get_full_grad(parameter)
                self.gradients[name] = found.detach().float().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not pl_module.automatic_optimization:
            return
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            shown = trainer.callback_metrics
            names = ("train/loss", "train/grad_norm")
            self.logged.append({name: float(shown[name]) for name in names})


def plugin() -> SparseAttention:
    return SparseAttention(BUDGET, **ATTENTION)


def train(
    strategy: Any,
    devices: int,
    accumulate: int,
    data: Rows,
    callbacks: list[Callback],
    module: SparseLM | None = None,
    **options: Any,
) -> SparseLM:
    torch.manual_seed(0)
    module = module or SparseLM(architecture=ARCHITECTURE, warmup_steps=0, learning_rate=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, datamodule=data)
    return module


def make_module(tied: bool, **memory: Any) -> SparseLM:
    torch.manual_seed(0)
    architecture = {**ARCHITECTURE, "tie_word_embeddings": tied}
    return SparseLM(architecture=architecture, warmup_steps=0, learning_rate=1e-3, **memory)


def gradients(
    strategy: Any,
    data_size: int,
    accumulate: int,
    devices: int,
    module: SparseLM | None = None,
) -> dict[str, Any]:
    """Three optimizer steps with clipped gradients; the second has no label if it has one row."""
    keep = Keep()
    data = Rows(data_size * accumulate, steps=3)
    callbacks = [plugin(), keep]
    train(strategy, devices, accumulate, data, callbacks, module, gradient_clip_val=0.05)
    return {"gradients": keep.gradients, "logged": keep.logged, "losses": keep.losses}


def curve(strategy: Any, data_size: int, devices: int) -> list[float]:
    """The training loss of 30 optimizer steps of four rows."""
    keep = Keep()
    data = Rows(4, steps=30, seed=1)
    train(strategy, devices, 4 // data_size, data, [plugin(), keep])
    return [logged["train/loss"] for logged in keep.logged]


class Late(SparseLM):
    """A module that builds its model in `configure_model`, as Lightning advises."""

    def __init__(self) -> None:
        super().__init__(architecture=ARCHITECTURE, warmup_steps=0, learning_rate=1e-3)
        self.model = None

    def configure_model(self) -> None:
        torch.manual_seed(0)
        super().configure_model()


class Manual(SparseLM):
    """Takes its optimizer steps itself."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def manual() -> dict[str, Any]:
    """One step of two rows."""
    keep = Keep()
    torch.manual_seed(0)
    module = Manual(architecture=ARCHITECTURE, warmup_steps=0, learning_rate=1e-3)
    train(DeepSpeedSparseStrategy(stage=2), 2, 1, Rows(2), [plugin(), keep], module)
    return {"gradients": keep.gradients, "logged": []}


def generated() -> dict[str, list[int]]:
    """What a model that was trained in parts of rows generates behind a whole one."""
    strategy = DeepSpeedSparseStrategy(stage=2, sequence_parallel=2)
    model = train(strategy, 2, 1, Rows(1), [plugin()]).model.eval()
    ids, options = rows(1)[0]["input_ids"], {"max_new_tokens": 3, "do_sample": False}
    after = model.generate(ids, **options)
    with whole_sequences(model):
        return {"after": after.tolist(), "whole": model.generate(ids, **options).tolist()}


class Unaware(SparseLM):
    """A module that would pass whole rows to the model."""

    shards_sequences = False


def refusals() -> dict[str, str]:
    """What two ranks that would share rows are told."""
    one_head = SparseLM(architecture={**ARCHITECTURE, "num_key_value_heads": 1})
    told = {}
    for name, module, callbacks, options in (
        ("one head", one_head, [plugin()], {}),
        ("not sparse", None, [], {}),
        ("unaware", Unaware(architecture=ARCHITECTURE), [plugin()], {}),
        ("float16", None, [plugin()], {"precision": "16-mixed"}),
    ):
        strategy = DeepSpeedSparseStrategy(stage=2, sequence_parallel=2)
        try:
            train(strategy, 2, 1, Rows(1), callbacks, module, **options)
        except ValueError as error:
            told[name] = str(error)
    return told


def measure(data_size: int, sequence_size: int) -> dict[str, Any]:
    """What the ranks of one size find, by case: (stage, accumulation), "ddp",
    "manual", ("offload", stage), ("memory", stage, tied), "curve", "refusals", "generated", "late".
    """
    world = data_size * sequence_size
    found: dict[Any, Any] = {}
    for stage, accumulate in CASES:
        strategy = DeepSpeedSparseStrategy(stage=stage, sequence_parallel=sequence_size)
        found[stage, accumulate] = gradients(strategy, data_size, accumulate, world)
    if sequence_size == 1:
        found["ddp"] = gradients("ddp", data_size, 4, world)
        if data_size == 2:
            found["manual"] = manual()
        for stage in (1, 2, 3):
            strategy = DeepSpeedSparseStrategy(
                stage=stage,
                offload_optimizer="cpu",
                offload_parameters="cpu" if stage == 3 else None,
            )
            found["offload", stage] = gradients(strategy, data_size, 4, world)
    if world == 2:
        for stage, tied in MEMORY_CASES:
            strategy = DeepSpeedSparseStrategy(stage=stage, sequence_parallel=sequence_size)
            module = make_module(tied, **MEMORY)
            found["memory", stage, tied] = gradients(
                strategy, data_size, 4 // data_size, world, module
            )
    if (data_size, sequence_size) == (1, 2):
        found["refusals"] = refusals()
        strategy = DeepSpeedSparseStrategy(stage=3, sequence_parallel=sequence_size)
        found["late"] = gradients(strategy, data_size, 1, world, Late())
        found["generated"] = generated()
    if (data_size, sequence_size) == (2, 2):
        strategy = DeepSpeedSparseStrategy(stage=3, sequence_parallel=sequence_size)
        found["curve"] = curve(strategy, data_size, world)
    return found


def main(size: str, out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import_for_ranks()
    data_size, sequence_size = map(int, size.split("x"))

    def run() -> None:
        found = measure(data_size, sequence_size)
        if os.environ["RANK"] == "0":
            torch.save(found, out)

    fork(data_size * sequence_size, run)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
