"""Corpora, tokenizers, packed rows and the stateless batch schedule; see `PackedTextDataModule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_sparse.data.documents import Documents
from lit_sparse.data.rows.index import FILLER, RowIndex
from lit_sparse.data.rows.mixture import schedule
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.tasks import CommonWord, Passkey
from lit_sparse.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from lit_sparse.data.datamodule import PackedTextDataModule
    from lit_sparse.data.stores.pack import pack

__all__ = [
    "FILLER",
    "ByteTokenizer",
    "CommonWord",
    "Documents",
    "HFTokenizer",
    "PackedTextDataModule",
    "Passkey",
    "RowIndex",
    "TokenStore",
    "Tokenizer",
    "load_tokenizer",
    "pack",
    "schedule",
]


def __getattr__(name: str) -> Any:
    # Lightning and Arrow take long to import, and everything else here does without.
    if name == "pack":
        from lit_sparse.data.stores.pack import pack

        return pack
    if name == "PackedTextDataModule":
        from lit_sparse.data.datamodule import PackedTextDataModule

        return PackedTextDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
