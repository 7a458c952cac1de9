"""One layer's attention: `attend` for eager mode, `lit_sparse::attention` for compiled graphs.

Documents and plans are host arithmetic on the data of a batch: `torch.compile` would trace them in
pieces, and again for every batch. The operator holds all of it, so that a graph depends on shapes
only and is one for the whole model. Eager mode goes around it: it costs about 100 us a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.attention.op import default_backend, get_backend, runs_dense
from lit_sparse.attention.options import Options
from lit_sparse.attention.plan import make_plan
from lit_sparse.attention.select import tile_of
from lit_sparse.models.documents import DocumentCache, Documents
from lit_sparse.models.state import Law, ModelState, read_law

Lengths = Tensor | Sequence[int] | None
Sources = tuple[Tensor | None, Tensor | None, Lengths, Lengths]
"""What tells documents: attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k."""

# They read documents on the host.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def find(model: ModelState | None, layer: int, q: Tensor, k: Tensor, sources: Sources) -> Documents:
    """The documents of q [batch, q_len, ...] and k [batch, k_len, ...], once a forward."""
    # A model may be gone before its last backward.
    cache = DocumentCache() if model is None else model.documents
    mask, positions, cu_q, cu_k = sources
    return cache.find(
        layer,
        q.shape[0],
        q.shape[1],
        k.shape[1],
        attention_mask=mask,
        position_ids=positions,
        cu_seq_lens_q=cu_q,
        cu_seq_lens_k=cu_k,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    documents: Documents,
    options: Options,
    law: Law,
    backend: str | None,
    layer: int,
    model: ModelState,
) -> tuple[Tensor, Tensor, Selection | None]:
    """Selection, operator and observers of one layer.

    q [batch, q_len, Hq, D], k, v [batch, k_len, Hkv, D], with padding. Returns out and lse packed,
    [T, Hq, D] and [T, Hq], and the selection, None for a batch of nothing but padding.
    """
    q, k, v = pack(q, documents.queries), pack(k, documents.keys), pack(v, documents.keys)
    if not len(q):
        # Connected, so that every parameter has a gradient (DDP).
        out = q + k.sum() + v.sum()
        out = out if sinks is None else out + sinks.sum().to(out.dtype)
        return out, out.new_zeros(out.shape[:2], dtype=_lse_dtype(out)), None
    scale = options.scale
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
            window=options.window,
        )
        out, lse = sparse_attention(
            q,
            k,
            v,
            selection,
            scale,
            backend,
            window=options.window,
            softcap=options.softcap,
            sinks=sinks,
        )
        seen = options if sinks is None else replace(options, sinks=sinks.detach())
        model.notify(layer, (q, k, v, out, lse), selection, seen, documents)
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


@torch.library.custom_op("lit_sparse::attention", mutates_args=(), tags=_TAGS)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    layer: Tensor,
    model: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    law: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`find` and `attend` as one operator, differentiable by q, k, v and sinks.

    Args:
        q: [batch, q_len, Hq, D].
        k, v: [batch, k_len, Hkv, D].
        sinks: [Hq] or None; like scale, window, softcap and backend, see `sparse_attention`.
        attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k: see `find_documents`.
        layer, model: who asks, `LayerState.number` and `ModelState.number`.
        law: `LayerState.law`.

    Returns:
        out [batch, q_len, Hq, D], 0 at padding; lse [batch, q_len, Hq]; columns and entry of the
        selection, [Hkv, slots], for the backward. Only out is differentiable.
    """
    state, asking = ModelState.numbered[int(model)], int(layer)
    sources = (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    documents = find(state, asking, q, k, sources)
    options = Options(scale, window, softcap)
    out, lse, selection = attend(
        q, k, v, sinks, documents, options, read_law(law), backend, asking, state
    )
    if selection is None or runs_dense(q, sinks, selection, options, backend):
        # The dense backward reads no lists, and those of everything are quadratic.
        columns = q.new_empty(k.shape[2], 0, dtype=torch.int32)
        entry = torch.empty_like(columns)
    else:
        columns, entry = selection.columns.contiguous(), selection.entry.contiguous()
        if state.observers:
            # Observers may keep the selection; the graph may use its outputs' memory again.
            columns, entry = columns.clone(), entry.clone()
    out, lse = (unpack(x, documents.queries, *q.shape[:2]).contiguous() for x in (out, lse))
    return out, lse, columns, entry


@torch.library.custom_op("lit_sparse::attention_backward", mutates_args=(), tags=_TAGS)
def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    columns: Tensor,
    entry: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    layer: Tensor,
    model: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    law: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lit_sparse::attention` by q, k, v and sinks (empty without them).

    A backend has a backward that starts from out and lse. The dense fallback and the reference have
    autograd's only: they run again, so that compiled gradients are those of eager mode.
    """
    sources = (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    documents = find(ModelState.numbered.get(int(model)), int(layer), q, k, sources)
    obeyed, options = read_law(law), Options(scale, window, softcap)
    queries = documents.cu_seqlens
    keys = documents.cu_seqlens_k or queries
    tile = tile_of(obeyed.tile, queries, keys, q.shape[2] // k.shape[2])
    plan = make_plan(queries, keys, obeyed.budget, obeyed.block, tile, window)
    selection = Selection(plan, columns, entry)

    inputs = [pack(q, documents.queries), *(pack(x, documents.keys) for x in (k, v))]
    grad, out, lse = (pack(x, documents.queries) for x in (grad, out, lse))
    with torch.autocast(q.device.type, enabled=False):
        if backend == "reference" or runs_dense(inputs[0], sinks, selection, options, backend):

            def again(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
                extras: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks}
                return sparse_attention(q, k, v, selection, scale, backend, **extras)[0]

            given = inputs if sinks is None else [*inputs, sinks]
            grads = (*torch.func.vjp(again, *given)[1](grad), None)
        else:
            kernels = get_backend(backend or default_backend(q.device))
            grads = kernels.backward(grad, *inputs, sinks, out, lse, selection, options)
    dq = unpack(grads[0], documents.queries, *q.shape[:2])
    dk, dv = (unpack(x, documents.keys, *k.shape[:2]) for x in grads[1:3])
    d_sinks = q.new_empty(0) if grads[3] is None else grads[3]
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), d_sinks


def _fake(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, ...]:
    # How long the lists are depends on the documents' lengths, and so on data.
    slots = torch.library.get_ctx().new_dynamic_size()
    columns = q.new_empty(k.shape[2], slots, dtype=torch.int32)
    lse = q.new_empty(q.shape[:3], dtype=_lse_dtype(q))
    return q.new_empty(q.shape), lse, columns, torch.empty_like(columns)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, sinks = args[5:9]
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.constants = inputs[:10], inputs[10:]
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second time
    dq, dk, dv, d_sinks = attention_backward(grad, *saved, *ctx.constants)
    sinks = saved[7]
    return dq, dk, dv, None if sinks is None else d_sinks, *(None,) * 11


attention.register_fake(_fake)
attention.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_fake(_fake_backward)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
