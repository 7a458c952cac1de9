"""The attention function that transformers' layers call: documents, selection, operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.attention.options import Options
from lit_sparse.models import ops
from lit_sparse.models.state import NAME, LayerState, layer_state, read_law


def sparse_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call: `attend_whole`, through the exchange of sequence-parallel
    ranks where the model has one.
    """
    state = layer_state(module)
    exchange = None if state is None else state.model.exchange
    function = attend_whole if exchange is None else exchange
    return function(module, query, key, value, attention_mask, *args, **kwargs)


def attend_whole(
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
    """Sparse attention of whole sequences, under the contract of transformers'
    `AttentionInterface`.

    Args:
        module: an attention layer of a model that went through `sparsify`.
        query: [batch, query heads, q_len, head_dim], RoPE applied.
        key, value: [batch, key-value heads, k_len, head_dim], cached tokens included, heads not
            repeated.
        attention_mask: None or a 2D padding mask [batch, k_len].
        scaling: factor of the scores; None for 1 / sqrt(head_dim).
        sliding_window: keys that a row of a layer with a window sees, its own included.
        softcap, s_aux: of the scores, and the sinks [query heads]; see `sparse_attention`.
        others: see `find_documents`; kwargs of other attention functions are ignored.

    Returns:
        The output [batch, q_len, query heads, head_dim], 0 at padding, and None for the weights.

    Raises:
        NotImplementedError: a feature of the layer that the operator lacks; layer and feature are
            named.
        ValueError: no `sparsify`, or another window than then.
    """
    state = layer_state(module)
    if state is None:
        raise ValueError(
            f"a {type(module).__name__} runs attn_implementation={NAME!r} without a budget: call "
            "lit_sparse.sparsify(model, budget)"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    _refuse_unsupported(state, dropout, causal)
    if sliding_window != state.window:
        raise ValueError(
            f"{state.name} has a sliding window of {sliding_window} keys, but had {state.window} "
            "when the model was made sparse: call sparsify again"
        )

    # Under autocast RoPE leaves queries and keys in float32 while values are in half precision.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    model = state.model
    sources: ops.Sources = (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    if torch.compiler.is_compiling():
        tensors = [torch.tensor(x) if isinstance(x, (tuple, list)) else x for x in sources]
        constants = (scale, sliding_window, softcap, state.law, model.backend)
        asking = (state.number, model.number)
        return ops.attention(q, k, v, s_aux, *tensors, *asking, *constants)[0], None
    documents = ops.find(model, state.layer, q, k, sources)
    out, _, _ = ops.attend(
        q,
        k,
        v,
        s_aux,
        documents,
        Options(scale, sliding_window, softcap),
        read_law(state.law),
        model.backend,
        state.layer,
        model,
    )
    return ops.unpack(out, documents.queries, *q.shape[:2]), None


def padding_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The 2D padding mask, or None, under the contract of transformers' `AttentionMaskInterface`.

    No n x n mask is built, as for flash attention. A mask with fewer columns than there are keys
    tells how much of a static cache is filled. Whether a mask has padding depends on data: a
    compiled graph, which cannot ask, hands over every mask, and `find_documents` looks.

    Raises:
        ValueError: the mask does not cover the cached tokens.
    """
    compiling = torch.compiler.is_compiling()
    if attention_mask is None:
        if compiling or (filled := int(q_offset) + q_length - kv_offset) >= kv_length:
            return None
        return torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    # Of a window's cache, which drops tokens, the mask may have been cut already.
    if not compiling and attention_mask.shape[1] < min(int(q_offset) + q_length, kv_length):
        raise ValueError(
            f"the attention mask covers {attention_mask.shape[1]} tokens, but with the cached ones "
            f"there are {int(q_offset) + q_length}: pass the mask of all of them"
        )
    attention_mask = attention_mask[:, -kv_length:]
    whole = attention_mask.shape[1] == kv_length
    if whole and not compiling and attention_mask.all():
        return None
    return attention_mask


def _refuse_unsupported(state: LayerState, dropout: float, causal: bool) -> None:
    refused = {
        f"attention dropout ({dropout})": (
            dropout > 0,
            "load the model with attention_dropout=0.0",
        ),
        "bidirectional attention (is_causal=False)": (not causal, "selection is causal"),
    }
    for feature, (present, advice) in refused.items():
        if present:
            raise NotImplementedError(
                f"{state.name}: sparse attention does not support {feature}: {advice}, or call "
                "unsparsify(model) to go back to its own attention"
            )
