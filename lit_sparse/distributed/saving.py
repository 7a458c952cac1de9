"""Lightning's DeepSpeed strategy with checkpoints that are whole, safe, and of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.trainer.states import TrainerFn

from lit_sparse.distributed.checkpoint import check_sharding, description, run_state
from lit_sparse.distributed.shards import load_sharded, save_sharded
from lit_sparse.distributed.weights import full_state_dict, load_full_state_dict
from lit_sparse.files import remove
from lit_sparse.models.lora.checkpoints import check_adapters, left_out


class SavingStrategy(DeepSpeedStrategy):
    """A checkpoint to go on from is a directory of shards, see `lit_sparse.distributed.checkpoint`;
    one of weights only (`trainer.save_checkpoint(path, weights_only=True)`) an ordinary file with
    the whole state dict, which every strategy can validate and test.
    """

    stage: int
    sequence_parallel: int

    @property
    def sharding(self) -> dict[str, int]:
        """What a checkpoint that this run continues from has to be cut for."""
        data, sequence = self.world_size // self.sequence_parallel, self.sequence_parallel
        return {"stage": self.stage, "data": data, "sequence": sequence}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}  # in the shards

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a sharded checkpoint, a directory; or, of weights only, one ordinary file."""
        if storage_options is not None:
            raise TypeError("storage_options: DeepSpeed writes to local file systems only")
        assert self.lightning_module is not None
        path = Path(self.broadcast(filepath))
        full = "optimizer_states" not in checkpoint
        sharding = None if full else self.sharding
        about = description(self.lightning_module, sharding)
        checkpoint["lit_sparse"] = {**checkpoint.get("lit_sparse", {}), **about}
        if full:
            frozen = left_out(self.lightning_module)
            checkpoint["state_dict"] = full_state_dict(self.deepspeed_engine, but=frozen)
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            self.barrier("full checkpoint")
        else:
            in_shards = ("state_dict", "optimizer_states")
            state = {key: value for key, value in checkpoint.items() if key not in in_shards}
            save_sharded(self.deepspeed_engine, state, path, left_out(self.lightning_module))

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a sharded checkpoint of the same ranks and stage, or the file of any strategy to
        validate or test it.

        Raises:
            ValueError: this run cannot go on from it.
        """
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        path = Path(self.broadcast(checkpoint_path))
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        if path.is_dir() or fitting:
            check_sharding(path, self.sharding)
            check_adapters(run_state(path)["lit_sparse"], module)
            engine, strict = self.deepspeed_engine, module.strict_loading
            return load_sharded(engine, path, fitting, strict)
        # Only what a rank copies is read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if "state_dict" in checkpoint:  # of a file; shards are in their places already
            weights = checkpoint["state_dict"]
            load_full_state_dict(self.deepspeed_engine, weights, strict)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            remove(Path(filepath))
