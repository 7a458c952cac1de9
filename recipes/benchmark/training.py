"""A model in training, whose attention is sparse or dense: what `--what step` times.

All but the attention is the same object on both sides: SparseLM with its layers, its loss and its
optimizer, on rows of one document each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark.memory import (
    give_back,
    high_water_mark,
    in_own_process,
    reset_mark,
)
from lit_sparse.recipes.benchmark.shapes import SHAPES
from lit_sparse.recipes.benchmark.steps import SEED
from lit_sparse.training.activations import Activations
from lit_sparse.training.loss import Loss

WARM_UP = 1024
"""Tokens of a step that only loads what is loaded once."""

_MODULE = "lit_sparse.recipes.benchmark.training"


@dataclass(frozen=True)
class Task:
    """A model, its law, and how it trains.

    Args:
        shape: a name of `SHAPES`; layers: of the model.
        dtype: of weights, gradients, activations and optimizer states.
        activations, loss, liger_kernels, compile: those keys of SparseLM.
    """

    shape: str
    layers: int
    dtype: str
    budget: Budget
    block: int
    tile: int | None
    activations: Activations
    loss: Loss
    liger_kernels: bool
    compile: bool

    def architecture(self, length: int) -> dict[str, Any]:
        return SHAPES[self.shape].config(self.layers, length)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Task:
        return cls(**{**stored, "budget": Budget(**stored["budget"])})


@dataclass(frozen=True)
class Side:
    """One kind of attention in the model.

    Args:
        label: its name in the table.
        ours: our operator runs, else transformers' sdpa attention.
        kernel: the context of a step.
    """

    label: str
    ours: bool
    kernel: Callable[[], AbstractContextManager[Any]] = nullcontext


SPARSE = Side("sparse", ours=True)
OWN = Side("own", ours=True)
"""Our operator where nothing is dropped: cuDNN's kernel on Hopper, else flash."""


def dense_sides(device: torch.device, compiled: bool) -> list[Side]:
    """What stands for dense attention: the fastest of them."""
    if device.type == "cpu":
        return [Side("sdpa", ours=False), OWN]
    flash = Side("flash", False, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION))
    cudnn = Side("cudnn", False, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION))
    # A graph holds the kernel that it was compiled with: a second one would run the first.
    return [flash, OWN] if compiled else [flash, cudnn, OWN]


class Training:
    """SparseLM and its optimizer on one device, in any of the sides' attention.

    Args:
        longest: tokens of the longest row.

    Raises:
        ValueError: a setting of the task that SparseLM refuses.
    """

    def __init__(self, task: Task, device: torch.device, longest: int) -> None:
        from lit_sparse.models import restore_frequencies
        from lit_sparse.training import SparseLM

        torch.manual_seed(SEED)
        self.task, self.device = task, device
        with device:
            self.module = SparseLM(
                architecture=task.architecture(longest),
                learning_rate=1e-5,
                activations=task.activations,
                loss=task.loss,
                liger_kernels=task.liger_kernels,
                compile=task.compile,
            )
        self.module.to(getattr(torch, task.dtype)).train()
        restore_frequencies(self.module.model)  # as in a run in half precision
        self.optimizer = self.module.adamw()

    @property
    def vocabulary(self) -> int:
        return self.module.model.config.vocab_size

    def row(self, length: int) -> dict[str, torch.Tensor]:
        """A document of random tokens; the labels are shifted already, as in a batch."""
        draw = torch.Generator(self.device).manual_seed(SEED)
        tokens = torch.randint(self.vocabulary, (1, length + 1), generator=draw, device=self.device)
        positions = torch.arange(length, device=self.device)[None]
        return {
            "input_ids": tokens[:, :-1].contiguous(),
            "position_ids": positions,
            "labels": tokens[:, 1:].contiguous(),
        }

    def use(self, side: Side) -> None:
        """Have the model attend in this way from now on."""
        from lit_sparse.models import sparsify, unsparsify

        task = self.task
        if side.ours:
            budget = task.budget if side is SPARSE else Budget.dense()
            sparsify(self.module.model, budget, block=task.block, tile=task.tile)
        else:
            unsparsify(self.module.model)

    def step(self, side: Side, row: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward, loss, backward and optimizer; the mean loss of the row in nats."""
        with side.kernel():
            total, count = self.module.token_loss(row)
            loss = total / count
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def peak_mib(task: Task, length: int, side: Side, threads: int) -> float | None:
    """MiB of a training process on the CPU beyond what it was before the model; see `memory`."""
    sent = {"task": task.to_dict(), "length": length, "side": side.label, "threads": threads}
    return in_own_process(_MODULE, sent)


def _measure(sent: dict[str, Any]) -> float | None:
    torch.set_num_threads(sent["threads"])
    task, length, cpu = Task.from_dict(sent["task"]), sent["length"], torch.device("cpu")
    sides = {side.label: side for side in (SPARSE, *dense_sides(cpu, task.compile))}
    side = sides[sent["side"]]
    short = Training(task, cpu, length)  # loads what is loaded once, transformers above all
    short.use(side)
    short.step(side, short.row(min(length, WARM_UP)))
    del short
    give_back()
    used = reset_mark()
    if used is None:
        return None
    training = Training(task, cpu, length)
    training.use(side)
    training.step(side, training.row(length))
    mark = high_water_mark()
    return None if mark is None else max(mark - used, 0) / 2**20


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
