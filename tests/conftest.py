"""What all tests share: few threads (the suite runs beside other work), tiny models and corpora."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Kernels run in Triton's interpreter where there is no GPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Packed corpora and rows of the tests: not in the user's own cache."""
    os.environ["LIT_SPARSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
}


@pytest.fixture
def architecture() -> dict:
    """Keys of a Llama config small enough to train in a test; bytes and a document end."""
    return dict(ARCHITECTURE)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of twelve text files of about 3000 bytes with some repetition to learn."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        lines = [f"def value_{j}(x):\n    return x + {i * j}\n\n" for j in range(75)]
        (folder / f"file{i:02d}.py").write_text("".join(lines))
    return folder
