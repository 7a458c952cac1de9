"""Many processes: DeepSpeed's ZeRO and Ulysses under Lightning, on GPUs and on CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_sparse.distributed.ranks import Ranks, gradient_divisor, ranks_of

if TYPE_CHECKING:
    from lit_sparse.distributed.strategy import DeepSpeedSparseStrategy
    from lit_sparse.distributed.ulysses import shard_sequence

__all__ = ["DeepSpeedSparseStrategy", "Ranks", "gradient_divisor", "ranks_of", "shard_sequence"]


def __getattr__(name: str) -> Any:
    # Lightning and transformers take seconds to import.
    if name == "DeepSpeedSparseStrategy":
        from lit_sparse.distributed.strategy import DeepSpeedSparseStrategy

        return DeepSpeedSparseStrategy
    if name == "shard_sequence":
        from lit_sparse.distributed.ulysses import shard_sequence

        return shard_sequence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
