"""The bridge to transformers: sparse attention in causal language models, RoPE, construction."""

from lit_sparse.models.build import build_model
from lit_sparse.models.documents import Documents, find_documents
from lit_sparse.models.rope import rope_parameters, set_max_positions, set_rope
from lit_sparse.models.sparsify import (
    Observation,
    dense_attention,
    is_sparse,
    law_of,
    observe,
    set_dense,
    sparsify,
    unsparsify,
)
from lit_sparse.models.state import Law
from lit_sparse.models.support import SUPPORTED, attention_layers, check_support, find_models

__all__ = [
    "SUPPORTED",
    "Documents",
    "Law",
    "Observation",
    "attention_layers",
    "build_model",
    "check_support",
    "dense_attention",
    "find_documents",
    "find_models",
    "is_sparse",
    "law_of",
    "observe",
    "rope_parameters",
    "set_dense",
    "set_max_positions",
    "set_rope",
    "sparsify",
    "unsparsify",
]
