"""A config that is small, and how to estimate it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import yaml

from lit_sparse.recipes.estimate import main
from lit_sparse.recipes.estimate.settings import Settings, read_settings

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 65536,
    "bos_token_id": None,
    "eos_token_id": 256,
}
CONFIG = {
    "model": {"architecture": ARCHITECTURE, "loss_chunk": 256},
    "sparse_attention": {
        "budget": {"alpha": 4.0, "exponent": 0.5, "floor": 64, "sink": 16},
        "block": 16,
        "tile": 16,
    },
    "curriculum": {
        "stages": [
            {"length": 256, "steps": 10, "attention": "dense"},
            {"length": 1024, "steps": 20},
        ]
    },
    "data": {"row_tokens": 1024, "rows_per_step": 4},
    "trainer": {"precision": "bf16-true"},
}


def write(folder: Path) -> Path:
    """The config as a file."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def estimate(config: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What is printed, and what is written."""
    out = config.parent / "out.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--config", str(config), "--json", str(out), *arguments]) == 0
    return printed.getvalue(), json.loads(out.read_text())


def settings(config: Path, *arguments: str) -> Settings:
    return read_settings(["--config", str(config), *arguments], None)


def keys(kind: str) -> dict[str, Any]:
    """Of the architecture, for another model type."""
    changed = {**ARCHITECTURE, "model_type": kind}
    if kind in ("mistral", "mixtral", "phi3"):
        changed |= {"sliding_window": None, "pad_token_id": None}
    if kind.startswith(("gemma", "gpt")):
        changed |= {"sliding_window": 100}
        changed |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    if kind in ("gpt_oss", "mixtral"):
        changed |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "qwen3_moe":
        changed |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return changed
