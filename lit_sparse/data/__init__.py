"""Corpora, tokenizers, packed rows and the stateless batch schedule; see `PackedTextDataModule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_sparse.data.corpus import TEXT_EXTENSIONS, Corpus, Skipped, read_corpus
from lit_sparse.data.retrieval import Passkey
from lit_sparse.data.rows import FILLER, RowIndex, fixed_rows
from lit_sparse.data.store import TokenStore, unigram_bits
from lit_sparse.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from lit_sparse.data.datamodule import PackedTextDataModule

__all__ = [
    "FILLER",
    "TEXT_EXTENSIONS",
    "ByteTokenizer",
    "Corpus",
    "HFTokenizer",
    "PackedTextDataModule",
    "Passkey",
    "RowIndex",
    "Skipped",
    "TokenStore",
    "Tokenizer",
    "fixed_rows",
    "load_tokenizer",
    "read_corpus",
    "unigram_bits",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and everything else here does without.
    if name == "PackedTextDataModule":
        from lit_sparse.data.datamodule import PackedTextDataModule

        return PackedTextDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
