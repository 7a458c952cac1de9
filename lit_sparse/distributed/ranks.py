"""Where a process stands among all: which rows it trains on, and which part of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The place of one process: data-parallel ranks read different rows, the sequence-parallel
    ranks of a group different parts of one row.
    """

    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1
    group: Any = None
    """Process group of the ranks that share a row; None where each has its own."""

    def own_part(self, length: int) -> slice:
        """The tokens of a row of `length` that this rank computes.

        Raises:
            ValueError: the row cannot be divided.
        """
        if length % self.sequence_size:
            raise ValueError(
                f"a row of {length} tokens cannot be divided among {self.sequence_size} "
                "sequence-parallel ranks (data.row_tokens and strategy.sequence_parallel)"
            )
        part = length // self.sequence_size
        return slice(self.sequence_rank * part, (self.sequence_rank + 1) * part)

    def own_heads(self, heads: int) -> slice:
        """The heads that this rank attends with, of `heads` in all."""
        part = heads // self.sequence_size
        return slice(self.sequence_rank * part, (self.sequence_rank + 1) * part)

    def whole_row(self, part: Tensor) -> Tensor:
        """The tokens [rows, T] of a row, of which each rank that shares it has a part [rows, T /
        sequence_size]; without a gradient.
        """
        if self.group is None:
            return part
        parts = [torch.empty_like(part) for _ in range(self.sequence_size)]
        torch.distributed.all_gather(parts, part.detach().contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def sum_of_row(self, value: Tensor) -> Tensor:
        """The sum of a value over the ranks that share a row; without a gradient."""
        if self.group is not None:
            value = value.detach().clone()
            torch.distributed.all_reduce(value, group=self.group)
        return value


def ranks_of(trainer: Any) -> Ranks:
    """The place of this process under the trainer's strategy, whichever that is."""
    found = getattr(trainer.strategy, "ranks", None)
    if isinstance(found, Ranks):
        return found
    return Ranks(data_rank=trainer.global_rank, data_size=trainer.world_size)


def gradient_divisor(trainer: Any) -> int:
    """What the strategy divides the gradients summed over all ranks and micro-batches by.

    A loss multiplied by it gives the gradient of the sum. DDP averages over the ranks; Lightning
    divides by the accumulation; DeepSpeed's own rule depends on the ZeRO stage.
    """
    found = getattr(trainer.strategy, "gradient_divisor", None)
    return int(trainer.world_size * trainer.accumulate_grad_batches if found is None else found)
