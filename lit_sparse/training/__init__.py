"""How a model is trained: the curriculum, the loss, the LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_sparse.training.curriculum import Curriculum, Doubling, Stage

if TYPE_CHECKING:
    from lit_sparse.training.module import SparseLM

__all__ = ["Curriculum", "Doubling", "SparseLM", "Stage"]


def __getattr__(name: str) -> Any:
    # Lightning and transformers take seconds to import, and the curriculum does without.
    if name == "SparseLM":
        from lit_sparse.training.module import SparseLM

        return SparseLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
