import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_sparse.data import pack
from lit_sparse.data.documents import Documents
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.tokenizer import ByteTokenizer


@pytest.fixture
def store_of(tmp_path: Path) -> Callable[..., TokenStore]:
    """Packs texts as bytes: store_of("one document", "another")."""
    made = 0

    def make(*texts: str) -> TokenStore:
        nonlocal made
        made += 1
        lines = [json.dumps({"text": text}) for text in texts]
        source = tmp_path / f"texts{made}.jsonl"
        source.write_text("\n".join(lines))
        return pack([source], ByteTokenizer(), tmp_path / f"store{made}")

    return make


@pytest.fixture
def documents_of(store_of) -> Callable[..., Documents]:
    """The same, as all documents of the store."""

    def make(*texts: str) -> Documents:
        return Documents(store_of(*texts), np.arange(len(texts)))

    return make


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    """24 text files of 100 to 2400 bytes, no two alike."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(24):
        text = "".join(f"{i:02d}/{j:04d} line\n" for j in range((i + 1) * 100 // 13 + 1))
        (folder / f"{i:02d}.txt").write_text(text[: (i + 1) * 100])
    return folder
