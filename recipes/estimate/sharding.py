"""What DeepSpeed keeps on each GPU and in CPU memory, by ZeRO stage and offload.

Read in DeepSpeed 0.19, and held against its engines in the tests. With P parameters of b bytes on N
GPUs (data and sequence parallel alike), AdamW, float32 masters and moments, where P is that of the
trained ones for all but the weights:

- weights: b P; in stage 3 b P / N, or none where they are offloaded.
- gradients: b P in stages 0 and 1; b P / N in stages 2 and 3, in 2 twice while micro-batches
  accumulate; none in stages 2 and 3 where the optimizer is offloaded.
- optimizer: 12 P / N (stage 0: 12 P, or 8 P in float32, which needs no master); none where it is
  offloaded.
- buffers: the bucket that gradients are reduced from. In stage 3 also the gathered weights, as many
  as may be alive at a time, and those that are being fetched once more; in stages 1 and 2 with
  offload the gradient of the largest module.
- step: float32 gradients and AdamW's temporary, 4 P / N each, when no activation is alive.
- CPU memory: what is offloaded. With the optimizer go float32 gradients (4 P / N), the new weights
  in stages 1 and 2, and gradients in stage 3, or in 2 while they accumulate (b P / N each).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lit_sparse.recipes.estimate.model import Model

STRATEGY = "lit_sparse.distributed.DeepSpeedSparseStrategy"

_REDUCED = 500_000_000
"""Gradients that DeepSpeed reduces at a time without ZeRO."""


@dataclass(frozen=True)
class Sharding:
    """How GPUs share a run.

    Args:
        gpus: data-parallel times sequence-parallel ranks.
        stage: of ZeRO; None: plain PyTorch (DDP on several GPUs).
        sequence: ranks that share a row.
        offload_optimizer, offload_parameters: "cpu", "nvme" (counted as CPU memory) or None.
    """

    gpus: int
    stage: int | None
    sequence: int = 1
    offload_optimizer: str | None = None
    offload_parameters: str | None = None

    @property
    def cost(self) -> tuple[int, ...]:
        """What the smallest sharding has least of: GPUs, then traffic (over PCIe before that
        between GPUs).
        """
        offloads = bool(self.offload_optimizer) + bool(self.offload_parameters)
        return self.gpus, offloads, -1 if self.stage is None else self.stage, self.sequence

    @property
    def offload(self) -> str:
        """For example "optimizer"; "-" for nothing."""
        parts = {"optimizer": self.offload_optimizer, "parameters": self.offload_parameters}
        return "+".join(name for name, device in parts.items() if device) or "-"

    def trainer(self, per_node: int) -> dict[str, Any]:
        """The keys of a config, on nodes of at most so many GPUs."""
        devices = min(self.gpus, per_node)
        arguments = {
            "stage": self.stage,
            "sequence_parallel": self.sequence,
            "offload_optimizer": self.offload_optimizer,
            "offload_parameters": self.offload_parameters,
        }
        return {
            "devices": devices,
            "num_nodes": -(-self.gpus // devices),
            "strategy": {"class_path": STRATEGY, "init_args": arguments},
        }


def refusal(sharding: Sharding, rows_per_step: int, row_tokens: int, kv_heads: int) -> str | None:
    """Why data and model cannot be divided so, or None."""
    gpus, sequence = sharding.gpus, sharding.sequence
    for total, what in (
        (gpus, f"the {gpus} GPUs"),
        (row_tokens, f"data.row_tokens = {row_tokens}"),
        (kv_heads, f"the {kv_heads} key-value heads"),
    ):
        if total % sequence:
            return f"strategy.sequence_parallel = {sequence} does not divide {what}"
    if rows_per_step % (gpus // sequence):
        return (
            f"data.rows_per_step = {rows_per_step} does not divide among the {gpus // sequence} "
            "data-parallel ranks (GPUs / sequence_parallel)"
        )
    return None


def shardings(gpus: int, rows_per_step: int, row_tokens: int, kv_heads: int) -> Iterator[Sharding]:
    """Every sharding on so many GPUs that data and model can be divided by."""
    for sequence in range(1, gpus + 1):
        if refusal(Sharding(gpus, 0, sequence), rows_per_step, row_tokens, kv_heads):
            continue
        yield Sharding(gpus, 0, sequence)
        for stage in (1, 2, 3):
            for optimizer in (None, "cpu"):
                for parameters in (None, "cpu") if stage == 3 else (None,):
                    yield Sharding(gpus, stage, sequence, optimizer, parameters)


@dataclass(frozen=True)
class Zero:
    """Keys of DeepSpeed's `zero_optimization`, in parameters, with its defaults."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Zero:
        """Those of a DeepSpeed config; its other keys do not matter here."""
        known = {field.name: given.get(field.name) for field in fields(cls)}
        return cls(**{k: v for k, v in known.items() if v not in (None, "auto")})


@dataclass(frozen=True)
class States:
    """Bytes on a GPU, and in CPU memory for it; see the module's text."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    step: float
    cpu: float


def states(
    sharding: Sharding, model: Model, itemsize: int, accumulates: bool, zero: Zero
) -> States:
    """What one GPU holds besides a row's activations.

    Args:
        itemsize: bytes of a weight.
        accumulates: whether an optimizer step has several micro-batches.
    """
    if sharding.stage is None:
        return _plain(sharding, itemsize, model)
    b, stage, total, trained = itemsize, sharding.stage, model.parameters, model.trained
    share = trained / sharding.gpus
    offloaded = sharding.offload_optimizer is not None
    weights = b * (total / sharding.gpus if stage == 3 else total)
    gradients = b * (trained if stage < 2 else share)
    if stage == 2 and accumulates:
        gradients *= 2
    optimizer, step = 12 * share, 8 * share
    buffers = b * zero.reduce_bucket_size * (2 if zero.overlap_comm and stage < 3 else 1)
    if stage == 0:
        master = 0 if b == 4 else 4
        # They are reduced in one piece, when the activations are gone.
        reduced = b * min(trained, _REDUCED) if sharding.gpus > 1 else 0
        optimizer, step = (8 + master) * trained, max((4 + master) * trained, reduced)
        buffers = 0
    if stage == 3:
        alive = max(zero.stage3_max_live_parameters, model.largest)
        buffers += b * (min(total, alive) + min(total, zero.stage3_prefetch_bucket_size))
    cpu = 0.0
    if offloaded:
        cpu = optimizer + 4 * share
        cpu += b * share * ((stage < 3) + (stage == 3 or (stage == 2 and accumulates)))
        optimizer = step = 0
        gradients *= stage == 1
        buffers += b * model.largest if stage < 3 else 0
    if sharding.offload_parameters:
        cpu, weights = cpu + weights, 0
    return States(weights, gradients, optimizer, buffers, step, cpu)


def _plain(sharding: Sharding, itemsize: int, model: Model) -> States:
    # Adapters, and what is trained beside them, are float32.
    trained = model.trained * (itemsize if model.lora is None else 4)
    weights = itemsize * (model.parameters - model.trained) + trained
    # DDP reduces gradients in buckets beside them; AdamW's states are of the weights' type.
    gradients = trained * (2 if sharding.gpus > 1 else 1)
    return States(weights, gradients, 2 * trained, 0, trained, 0)
