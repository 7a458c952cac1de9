"""lit-sparse: long-context fine-tuning with n^C-sparse attention, in PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Budget": "lit_sparse.budget",
    "Curriculum": "lit_sparse.training.curriculum",
    "Selection": "lit_sparse.attention",
    "SparseLM": "lit_sparse.training",
    "Stage": "lit_sparse.training.curriculum",
    "PackedTextDataModule": "lit_sparse.data",
    "select": "lit_sparse.attention",
    "sparse_attention": "lit_sparse.attention",
    "sparsify": "lit_sparse.models",
    "unsparsify": "lit_sparse.models",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    # Loaded when used: importing the package costs neither torch nor transformers nor Lightning.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
