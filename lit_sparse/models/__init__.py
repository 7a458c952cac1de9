"""The bridge to transformers: sparse attention in causal language models, RoPE, construction."""

from lit_sparse.models.architecture import architecture_keys, other_architecture
from lit_sparse.models.build import (
    build_model,
    check_source,
    model_config,
    pretrained_config,
    pretrained_generation,
    weight_files,
)
from lit_sparse.models.context import RopeOrigin, check_rule, extend_context, rule_parameters
from lit_sparse.models.documents import Documents, find_documents
from lit_sparse.models.observers import Observation, observe
from lit_sparse.models.rope import (
    rebuild_rope,
    restore_frequencies,
    rope_parameters,
    set_max_positions,
    set_rope,
)
from lit_sparse.models.sparsify import (
    alpha_factor,
    budget_of,
    configured_law,
    dense_attention,
    law_of,
    scale_budget,
    set_budget,
    set_dense,
    set_exchange,
    sparsify,
    unsparsify,
    whole_sequences,
)
from lit_sparse.models.state import Law, is_sparse
from lit_sparse.models.support import (
    SUPPORTED,
    attention_layers,
    check_support,
    find_models,
    idle_window,
    law_layers,
    named_models,
    window_of,
    windows_everywhere,
)

__all__ = [
    "SUPPORTED",
    "Documents",
    "Law",
    "Observation",
    "RopeOrigin",
    "alpha_factor",
    "architecture_keys",
    "attention_layers",
    "budget_of",
    "build_model",
    "check_rule",
    "check_source",
    "check_support",
    "configured_law",
    "dense_attention",
    "extend_context",
    "find_documents",
    "find_models",
    "idle_window",
    "is_sparse",
    "law_layers",
    "law_of",
    "model_config",
    "named_models",
    "observe",
    "other_architecture",
    "pretrained_config",
    "pretrained_generation",
    "rebuild_rope",
    "restore_frequencies",
    "rope_parameters",
    "rule_parameters",
    "scale_budget",
    "set_budget",
    "set_dense",
    "set_exchange",
    "set_max_positions",
    "set_rope",
    "sparsify",
    "unsparsify",
    "weight_files",
    "whole_sequences",
    "window_of",
    "windows_everywhere",
]
