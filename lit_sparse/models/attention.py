"""The attention function that transformers' layers call: documents, selection, operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.attention import select, sparse_attention
from lit_sparse.models.documents import Documents
from lit_sparse.models.state import NAME, LayerState, layer_state


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

    batch, _, q_len, _ = query.shape
    documents = state.model.documents.find(
        state.layer,
        batch,
        q_len,
        key.shape[2],
        attention_mask=attention_mask,
        position_ids=position_ids,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=cu_seq_lens_k,
    )
    # Under autocast RoPE leaves queries and keys in float32 while values are in half precision.
    q = _pack(query, documents.queries, value.dtype)
    k = _pack(key, documents.keys, value.dtype)
    v = _pack(value, documents.keys, value.dtype)
    # Autocast would round the operator's float32 sums to its own dtype.
    with torch.autocast(query.device.type, enabled=False):
        out = _attend(state, q, k, v, documents, scaling)
    return _unpack(out, documents.queries, batch, q_len), None


def _attend(
    state: LayerState, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scaling: float | None
) -> Tensor:
    model = state.model
    if not len(q):
        # A batch of nothing but padding. Connected, so that every parameter has a gradient (DDP).
        return q + k.sum() + v.sum()
    selection = select(
        q,
        k,
        state.budget,
        cu_seqlens=documents.cu_seqlens,
        cu_seqlens_k=documents.cu_seqlens_k,
        scale=scaling,
        block=model.law.block,
        tile=model.law.tile,
        score=model.law.score,
    )
    out, lse = sparse_attention(q, k, v, selection, scale=scaling, backend=model.backend)
    if model.observers and not in_backward():
        seen = [tensor.detach() for tensor in (q, k, v, out, lse)]
        for observer, layers in list(model.observers):
            if layers is None or state.layer in layers:
                observer(state.layer, *seen, selection, scaling, documents)
    return out


def _pack(tensor: Tensor, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[batch, heads, length, dim] as [tokens, heads, dim]; a view of what a layer projected."""
    packed = tensor.transpose(1, 2).flatten(0, 1)
    if indices is not None:
        packed = packed.index_select(0, indices)
    return packed.to(dtype)


def _unpack(out: Tensor, indices: Tensor | None, batch: int, q_len: int) -> Tensor:
    if indices is not None:
        out = out.new_zeros(batch * q_len, *out.shape[1:]).index_copy(0, indices, out)
    return out.unflatten(0, (batch, q_len))


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
