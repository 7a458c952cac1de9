"""The attention function that transformers' layers call: documents, selection, operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.models import ops
from lit_sparse.models.state import NAME, LayerState, layer_state, read_law


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | Sequence[int] | None = None,
    cu_seq_lens_k: Tensor | Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sparse attention under the contract of transformers' `AttentionInterface`.

    Args:
        module: an attention layer of a model that went through `sparsify`.
        query: [batch, query heads, q_len, head_dim], RoPE applied.
        key, value: [batch, key-value heads, k_len, head_dim], cached tokens included, heads not
            repeated.
        attention_mask: None or a 2D padding mask [batch, k_len].
        scaling: factor of the scores; None for 1 / sqrt(head_dim).
        others: see `find_documents`; kwargs of other attention functions are ignored.

    Returns:
        The output [batch, q_len, query heads, head_dim], 0 at padding, and None for the weights.

    Raises:
        NotImplementedError: a feature of the layer that the operator lacks; layer and feature are
        named.
    """
    state = layer_state(module)
    if state is None:
        raise ValueError(
            f"a {type(module).__name__} runs attn_implementation={NAME!r} without a budget: call "
            "lit_sparse.sparsify(model, budget)"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    _refuse_unsupported(state.name, dropout, causal, sliding_window, softcap, s_aux)

    # Under autocast RoPE leaves queries and keys in float32 while values are in half precision.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    model, sources = state.model, (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    # The reference has no backward that an operator could call.
    if torch.compiler.is_compiling() and model.backend != "reference":
        tensors = [
            torch.tensor(x) if isinstance(x, (tuple, list)) else x for x in sources
        ]
        return ops.attention(
            q, k, v, *tensors, scaling, state.law, model.backend, state.layer, model.number
        )[0], None
    return _eager(state, q, k, v, sources, scaling), None


@torch.compiler.disable
def _eager(state, q, k, v, sources, scaling):
    documents = ops.find(state.model, state.layer, q, k, *sources)
    out, _, _ = ops.attend(
        q, k, v, documents, read_law(state.law), scaling, state.model.backend, state.layer, state.model
    )
    return ops.unpack(out, documents.queries, *q.shape[:2])


def _refuse_unsupported(
    layer: str,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> None:
    refused = {
        f"attention dropout ({dropout})": (
            dropout > 0,
            "load the model with attention_dropout=0.0",
        ),
        "bidirectional attention (is_causal=False)": (not causal, "selection is causal"),
        f"a sliding window (sliding_window={sliding_window})": (
            sliding_window is not None,
            "load the model without it (Budget(..., local=1) is a sliding window that grows)",
        ),
        f"a soft cap on the scores (softcap={softcap})": (softcap is not None, "no backend has it"),
        "attention sinks (s_aux)": (s_aux is not None, "no backend has them"),
    }
    for feature, (present, advice) in refused.items():
        if present:
            raise NotImplementedError(
                f"{layer}: sparse attention does not support {feature}: {advice}, or call "
                "unsparsify(model) to go back to sdpa"
            )
