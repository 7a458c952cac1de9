"""The strategy for DeepSpeed: ZeRO 0 to 3, offload, sequence parallelism; on GPUs or CPUs."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, Precision
from pytorch_lightning.strategies import DeepSpeedStrategy, StrategyRegistry
from torch import nn

from lit_sparse.distributed import ulysses
from lit_sparse.distributed.discarding import as_after_overflow
from lit_sparse.distributed.options import deepspeed_config
from lit_sparse.distributed.precision import SparsePrecision
from lit_sparse.distributed.ranks import Ranks
from lit_sparse.distributed.saving import SavingStrategy

NAME = "deepspeed_sparse"


class DeepSpeedSparseStrategy(SavingStrategy):
    """Train with DeepSpeed, with the gradients of one process whatever the sharding.

    Differs from Lightning's strategy where that is wrong or refuses: it runs on CPUs (gloo) too, so
    that every path can be tried on a laptop; it counts gradient accumulation once; ranks that share
    a row (sequence parallelism) read the same one; hooks before an optimizer step are called before
    an optimizer step.

    A module's loss is averaged over ranks and micro-batches, as under DDP. For the mean over the
    tokens of all of them return `loss * gradient_divisor(trainer) / tokens of the step`, with the
    loss summed over this rank's tokens, as `SparseLM` does. Under sequence parallelism that is
    needed, and the module passes only its part of a row to the model, see `shard_sequence`; it says
    so by an attribute `shards_sequences = True`.

    Args:
        stage: of ZeRO. 0: nothing is sharded, 1: the optimizer's states, 2: gradients too, 3:
            parameters too.
        sequence_parallel: ranks that share a row; it divides the ranks, the row and the key-value
            heads of the model. Ranks of a group should be on one node.
        offload_optimizer: "cpu" or "nvme": where optimizer states live and steps run.
        offload_parameters: "cpu" or "nvme": where parameters wait (stage 3).
        nvme_path: folder on the NVMe device.
        timeout_minutes: after which a rank that waits for others in vain ends with an error. The
            slowest single thing that ranks wait for is a checkpoint or an export.
        config: a DeepSpeed config, as a mapping or a JSON file, whose keys count besides.

    Raises:
        ValueError: arguments or config contradict each other or the trainer.
    """

    strategy_name = NAME

    def __init__(
        self,
        stage: int = 2,
        sequence_parallel: int = 1,
        offload_optimizer: str | None = None,
        offload_parameters: str | None = None,
        nvme_path: str | None = None,
        timeout_minutes: float = 30.0,
        config: dict[str, Any] | str | None = None,
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns where it has to guess
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "strategy deepspeed_sparse needs DeepSpeed: pip install 'deepspeed>=0.19'"
            ) from error
        if sequence_parallel < 1:
            raise ValueError(f"strategy.sequence_parallel must be >= 1, got {sequence_parallel}")
        if not timeout_minutes > 0:
            raise ValueError(f"strategy.timeout_minutes must be > 0, got {timeout_minutes}")
        self.stage, self.sequence_parallel = stage, sequence_parallel
        self.offload_optimizer = offload_optimizer
        self._ranks = Ranks()
        self._discards = False
        self.discarded = False
        """Whether the last call of the engine's step was a step that `discard_step` was for."""
        self._patience = timedelta(minutes=timeout_minutes)
        made = deepspeed_config(stage, offload_optimizer, offload_parameters, nvme_path, config)
        super().__init__(config=made, logging_level=logging.WARNING, timeout=self._patience)

    # -- places --

    @property
    def ranks(self) -> Ranks:
        """Where this process stands."""
        return self._ranks

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        # The engine wants an index, which CPUs have none of.
        return device if device.type != "cpu" else torch.device("cpu", self.local_rank)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        sequence = self.sequence_parallel
        return {"num_replicas": self.world_size // sequence, "rank": self.global_rank // sequence}

    def setup_environment(self) -> None:
        # Lightning's strategy would refuse CPUs here; its parents do the rest.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
        else:
            _use_cpu()
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        self._ranks = self._find_ranks()

    def _find_ranks(self) -> Ranks:
        sequence, world = self.sequence_parallel, self.world_size
        if world % sequence:
            raise ValueError(
                f"strategy.sequence_parallel = {sequence} does not divide the {world} ranks "
                "(trainer.devices x trainer.num_nodes)"
            )
        data_rank, sequence_rank = divmod(self.global_rank, sequence)
        group = None
        if sequence > 1:
            state = _sequence_groups(sequence)
            group = state.get_sequence_parallel_group()
            for made in (group, state.get_sequence_data_parallel_group()):
                torch.distributed.distributed_c10d._set_pg_timeout(self._patience, made)
        return Ranks(data_rank, world // sequence, sequence_rank, sequence, group)

    # -- engine --

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning chooses its own for every DeepSpeed strategy.
        if type(plugin) is DeepSpeedPrecision:
            plugin = SparsePrecision(cast(Any, plugin.precision))
        self._precision_plugin = plugin

    def setup(self, trainer: Trainer) -> None:
        module, precision = self.lightning_module, self.precision_plugin.precision
        assert module is not None
        if self.root_device.type == "cpu" and str(precision).startswith("16"):
            raise ValueError(
                f"trainer.precision: {precision} is for GPUs; set bf16-mixed, bf16-true or 32-true "
                "for DeepSpeed on CPUs"
            )
        if self.sequence_parallel > 1:
            assert isinstance(self.config, dict)
            kept = self.config.get("data_types", {}).get("grad_accum_dtype")
            if self.stage == 1 and kept == "fp32" and "bf16" in precision:
                # Its optimizer for this case takes sequence parallelism for tensor parallelism.
                raise ValueError(
                    "strategy.config has data_types.grad_accum_dtype = 'fp32', which DeepSpeed "
                    "cannot do with strategy.stage: 1, bfloat16 and sequence parallelism: set "
                    "strategy.stage: 2"
                )
            ulysses.check_heads(module, self.sequence_parallel, self.world_size)
            if not getattr(module, "shards_sequences", False):
                raise ValueError(
                    f"strategy.sequence_parallel > 1, but {type(module).__name__} does not say "
                    "that it shards sequences: pass shard_sequence(batch, ranks_of(trainer)) to "
                    "the model, sum losses over the ranks of a row, and set shards_sequences = "
                    "True on the class"
                )
        super().setup(trainer)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        # Lightning enters DeepSpeed's zero.Init here: transformers models made in configure_model
        # would keep torch's own initial values, as theirs do not reach shards, and pretrained
        # weights would not fit. The engine shards what is built whole.
        self._init_config_if_needed()  # with the precision, which load_pretrained reads
        yield

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        mpu = _sequence_groups(self.sequence_parallel) if self.sequence_parallel > 1 else None
        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            mpu=mpu,
            dist_init_required=False,
        )
        return engine, wrapped

    @property
    def gradient_divisor(self) -> int:
        """See `lit_sparse.distributed.gradient_divisor`."""
        module = self.lightning_module
        assert module is not None
        # Stages 0 to 2 multiply by the sequence-parallel size what they divide by all ranks.
        ranks = self.world_size if self.stage == 3 else self._ranks.data_size
        return ranks * module.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        self._attach()

    def on_validation_start(self) -> None:
        self._attach()

    def on_test_start(self) -> None:
        self._attach()

    def on_predict_start(self) -> None:
        self._attach()

    def _attach(self) -> None:
        # Here and not in setup: the callbacks have made the models sparse by now.
        if self.lightning_module is not None:
            ulysses.attach(self.lightning_module, self._ranks)

    def teardown(self) -> None:
        if self.lightning_module is not None:
            ulysses.detach(self.lightning_module, self._ranks)
        super().teardown()

    # -- a step that is not to be --

    def discard_step(self) -> None:
        """Throw away the gradients of the coming optimizer step, weights and optimizer states stay.

        To be called on every rank, in `on_before_optimizer_step`.
        """
        self._discards = True

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Around the engine's step: obey `discard_step`."""
        self.discarded, self._discards = self._discards, False
        if not self.discarded:
            yield
            return
        optimizer: Any = self.deepspeed_engine.optimizer
        with as_after_overflow(optimizer):
            yield


def _use_cpu() -> None:
    """Let DeepSpeed compute on CPUs, on a machine with GPUs too."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    # Kernels for inference, which it would compile now, with a compiler that may not be there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _sequence_groups(size: int) -> Any:
    """DeepSpeed's module that holds the process groups, which are made once in a process."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as state

    if state._SEQUENCE_PARALLEL_GROUP is None:
        state.initialize_sequence_parallel(sequence_parallel_size=size)
    made = state.get_sequence_parallel_world_size()
    if made != size:
        raise ValueError(
            f"strategy.sequence_parallel = {size}, but this process has groups of {made} already: "
            "start a new one"
        )
    return state


StrategyRegistry.register(
    NAME, DeepSpeedSparseStrategy, description="DeepSpeed for sparse attention, ZeRO 2"
)
