"""One layer's attention: as a function for eager mode, as an operator for compiled graphs.

Documents and plans are host arithmetic on the data of a batch: `torch.compile` would trace them in
pieces, and again for every batch. `lit_sparse::attention` holds all of it, so that a graph depends
on shapes only. Eager mode goes around the operator, which costs about 100 us a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.attention.op import default_backend, get_backend
from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import tile_of
from lit_sparse.models.documents import DocumentCache, Documents
from lit_sparse.models.state import Law, ModelState, read_law


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    law: Law,
    scale: float | None,
    backend: str | None,
    layer: int,
    model: ModelState,
) -> tuple[Tensor, Tensor, Selection | None]:
    """Selection, operator and observers of one layer.

    q [batch, q_len, Hq, D], k, v [batch, k_len, Hkv, D], with padding. Returns out and lse packed,
    [T, Hq, D] and [T, Hq], and the selection: None for a batch of nothing but padding.
    """
    q, k, v = pack(q, documents.queries), pack(k, documents.keys), pack(v, documents.keys)
    if not len(q):
        # Connected, so that every parameter has a gradient (DDP).
        out = q + k.sum() + v.sum()
        return out, out.new_zeros(out.shape[:2], dtype=_lse_dtype(out)), None
    # Autocast would round the operator's float32 sums to its own dtype.
    with torch.autocast(q.device.type, enabled=False):
        selection = select(
            q,
            k,
            law.budget,
            cu_seqlens=documents.cu_seqlens,
            cu_seqlens_k=documents.cu_seqlens_k,
            scale=scale,
            block=law.block,
            tile=law.tile,
            score=law.score,
        )
        out, lse = sparse_attention(q, k, v, selection, scale=scale, backend=backend)
        model.notify(layer, (q, k, v, out, lse), selection, scale, documents)
    return out, lse, selection


def pack(x: Tensor, indices: Tensor | None) -> Tensor:
    """[batch, length, ...] as [tokens, ...] without the padding; a view where there is none."""
    packed = x.flatten(0, 1)
    return packed if indices is None else packed.index_select(0, indices)


def unpack(x: Tensor, indices: Tensor | None, batch: int, length: int) -> Tensor:
    """The inverse of `pack`, 0 at padding."""
    if indices is not None:
        x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x)
    return x.unflatten(0, (batch, length))


@torch.library.custom_op("lit_sparse::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    scale: float | None,
    law: str,
    backend: str | None,
    layer: int,
    model: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attend` for compiled graphs, documents included.

    Args:
        q: [batch, q_len, Hq, D].
        k, v: [batch, k_len, Hkv, D].
        attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k: see `find_documents`.
        scale: softmax scale; None: D ** -0.5.
        law: `LayerState.law`.
        backend: "cpu", "triton" or None; the reference has no backward to call.
        layer, model: who asks, `LayerState.layer` and `ModelState.number`.

    Returns:
        out [batch, q_len, Hq, D], 0 at padding; lse [batch, q_len, Hq], not differentiable; columns
        and entry of the selection [Hkv, slots], which the backward needs.
    """
    state = ModelState.numbered[model]
    sources = (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    documents = find(state, layer, q, k, *sources)
    out, lse, selection = attend(q, k, v, documents, read_law(law), scale, backend, layer, state)
    if selection is None:
        columns = q.new_empty(k.shape[2], 0, dtype=torch.int32)
        entry = torch.empty_like(columns)
    else:
        columns, entry = selection.columns, selection.entry
    out, lse = (unpack(x, documents.queries, *q.shape[:2]).contiguous() for x in (out, lse))
    return out, lse, columns, entry


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    scale: float | None,
    law: str,
    backend: str | None,
    layer: int,
    model: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # How long the lists are depends on the documents' lengths, and so on data.
    slots = torch.library.get_ctx().new_dynamic_size()
    columns = q.new_empty(k.shape[2], slots, dtype=torch.int32)
    lse = q.new_empty(q.shape[:3], dtype=_lse_dtype(q))
    return q.new_empty(q.shape), lse, columns, torch.empty_like(columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.constants = inputs[:7], inputs[7:]
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    return *attention_backward(grad, *ctx.saved_tensors, *ctx.constants), *(None,) * 9


attention.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("lit_sparse::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    columns: Tensor,
    entry: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    scale: float | None,
    law: str,
    backend: str | None,
    layer: int,
    model: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lit_sparse::attention` by q, k and v, from its results and arguments.

    Where the forward fell back to dense attention, the backward is nevertheless that of the blocks:
    it needs no more than out and lse, and is the faster of the two.
    """
    state = ModelState.numbered.get(model)
    sources = (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    documents = find(state, layer, q, k, *sources)
    obeyed = read_law(law)
    queries, keys = documents.cu_seqlens, documents.cu_seqlens_k or documents.cu_seqlens
    tile = tile_of(obeyed.tile, queries, keys, q.shape[2] // k.shape[2])
    plan = make_plan(queries, keys, obeyed.budget, obeyed.block, tile)
    with torch.autocast(q.device.type, enabled=False):
        grads = get_backend(backend or default_backend(q.device)).backward(
            pack(grad, documents.queries),
            pack(q, documents.queries),
            pack(k, documents.keys),
            pack(v, documents.keys),
            None,
            pack(out, documents.queries),
            pack(lse, documents.queries),
            Selection(plan, columns, entry),
            Options(q.shape[-1] ** -0.5 if scale is None else scale),
        )
    dq = unpack(grads[0], documents.queries, *q.shape[:2])
    dk, dv = (unpack(x, documents.keys, *k.shape[:2]) for x in grads[1:3])
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@attention_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    columns: Tensor,
    entry: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def find(
    model: ModelState | None,
    layer: int,
    q: Tensor,
    k: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | Sequence[int] | None,
    cu_seq_lens_k: Tensor | Sequence[int] | None,
) -> Documents:
    # A model may be gone before its last backward.
    cache = DocumentCache() if model is None else model.documents
    return cache.find(
        layer,
        q.shape[0],
        q.shape[1],
        k.shape[1],
        attention_mask=attention_mask,
        position_ids=position_ids,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=cu_seq_lens_k,
    )


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
