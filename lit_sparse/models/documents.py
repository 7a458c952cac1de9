"""Which tokens of a transformers batch attend to each other: documents, as host-side lengths.

A batch says it in one of three ways: flash-attention's cumulative lengths, a 2D mask with padding,
or position_ids that start again at every packed document. Reading any of them from a GPU waits for
it, so `DocumentCache` does it once per forward and not once per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import pad

# Forwards whose backward is still to come (gradient accumulation over checkpointed layers) and may
# ask again. A forward that fell out of the cache is read again: slower, never wrong.
_REMEMBERED = 16


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one forward, in the packed (varlen) convention of `lit_sparse.attention`.

    Args:
        cu_seqlens: first query of every document, and the end; `documents + 1` host integers.
        cu_seqlens_k: the same for the keys where they are more than the queries (cached decoding;
            the queries are a document's last tokens), else None.
        queries: int64 indices of the real queries among the `batch * q_len` of a padded batch, else
            None.
        keys: int64 indices of the real keys among the `batch * k_len` of a padded batch or a static
            cache, else None.
    """

    cu_seqlens: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...] | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


def find_documents(
    batch: int,
    q_len: int,
    k_len: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | Sequence[int] | None = None,
    cu_seq_lens_k: Tensor | Sequence[int] | None = None,
) -> Documents:
    """The documents of `batch` rows of `q_len` queries and `k_len` keys, cached ones included.

    Args:
        attention_mask: None or [batch, k_len]; 0 or false marks padding; then a row is a document.
            [batch, fewer] where the other keys are those of a static cache that no token has filled
            yet; the queries are the last tokens of the mask.
        position_ids: None, [batch, q_len] or [1, q_len]; without padding, a document starts with
            every row and wherever a position is not its left neighbour's plus one.
        cu_seq_lens_q: flash-attention's cumulative lengths of a batch of one row, [documents + 1];
            host integers cost no synchronisation. They overrule the positions.
        cu_seq_lens_k: the same for the keys; by default the queries'.

    Raises:
        ValueError: a mask that is not 2D, ways of telling documents that contradict each other, or
            padding between cached tokens.
        NotImplementedError: packed documents in a cache.
    """
    if k_len < q_len:
        raise ValueError(f"{k_len} keys for {q_len} queries: sparse attention is self-attention")
    if attention_mask is not None:
        _check_mask(attention_mask, batch, q_len, k_len)
    padded = attention_mask is not None and (
        attention_mask.shape[1] < k_len or not bool(attention_mask.all())
    )
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if padded:
            raise ValueError(
                "cu_seq_lens_q and an attention_mask with padding tell documents apart in two "
                "ways; pass one of them"
            )
        return _from_lengths(batch, q_len, k_len, cu_seq_lens_q, cu_seq_lens_k)
    if position_ids is not None:
        _check_positions(position_ids, batch, q_len)
    if padded:
        assert attention_mask is not None
        return _from_padding(attention_mask.bool(), q_len, k_len, position_ids)
    return _from_positions(batch, q_len, k_len, position_ids)


def _check_mask(mask: Tensor, batch: int, q_len: int, k_len: int) -> None:
    if mask.ndim != 2:
        raise ValueError(
            f"a {mask.ndim}D attention mask {list(mask.shape)} is refused: sparse attention never "
            "builds an n x n mask; pass position_ids that start again at every document, or a 2D "
            "padding mask"
        )
    if mask.shape[0] != batch or not q_len <= mask.shape[1] <= k_len:
        raise ValueError(f"attention_mask must be [{batch}, {k_len}], got {list(mask.shape)}")


def _check_positions(position_ids: Tensor, batch: int, q_len: int) -> None:
    if position_ids.ndim != 2 or position_ids.shape not in ((batch, q_len), (1, q_len)):
        raise ValueError(
            f"position_ids must be [{batch}, {q_len}] or [1, {q_len}], got "
            f"{list(position_ids.shape)}"
        )


def _from_lengths(
    batch: int,
    q_len: int,
    k_len: int,
    cu_seq_lens_q: Tensor | Sequence[int] | None,
    cu_seq_lens_k: Tensor | Sequence[int] | None,
) -> Documents:
    if cu_seq_lens_q is None:
        raise ValueError("cu_seq_lens_k without cu_seq_lens_q: pass both")
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q describes one packed row, but the batch has {batch} rows")
    queries = _cumulative("cu_seq_lens_q", cu_seq_lens_q, q_len)
    same = cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q
    keys = queries if same else _cumulative("cu_seq_lens_k", cu_seq_lens_k, k_len)
    if keys[-1] != k_len:
        raise ValueError(f"cu_seq_lens_k is needed where {q_len} queries meet {k_len} keys")
    if len(keys) != len(queries):
        raise ValueError(
            f"cu_seq_lens_q tells of {len(queries) - 1} documents, cu_seq_lens_k of {len(keys) - 1}"
        )
    for document in range(len(queries) - 1):
        have = keys[document + 1] - keys[document]
        need = queries[document + 1] - queries[document]
        if have < need:
            raise ValueError(f"document {document} has {need} queries but only {have} keys")
    return Documents(queries, None if keys == queries else keys)


def _cumulative(name: str, lengths: Tensor | Sequence[int] | None, end: int) -> tuple[int, ...]:
    values = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    assert values is not None
    cumulative = tuple(int(value) for value in values)
    rising = all(a <= b for a, b in pairwise(cumulative))
    if len(cumulative) < 2 or cumulative[0] != 0 or cumulative[-1] != end or not rising:
        raise ValueError(
            f"{name} must rise from 0 to the {end} tokens of the row, got {cumulative}"
        )
    return cumulative


def _from_padding(mask: Tensor, q_len: int, k_len: int, position_ids: Tensor | None) -> Documents:
    real = mask[:, mask.shape[1] - q_len :]
    if position_ids is not None and _packed_between_padding(real, position_ids):
        raise ValueError(
            "position_ids start again between two real tokens of a row, and the attention mask "
            "has padding: packed documents need a row without padding (give the padding positions "
            "of its own and drop the mask), padded rows hold one document each"
        )
    keys = pad(mask, (0, k_len - mask.shape[1])).flatten().nonzero().flatten()
    queries = real.flatten().nonzero().flatten()
    cu_seqlens_k = tuple(accumulate(mask.sum(1).tolist(), initial=0))
    if real.shape == mask.shape:
        return Documents(cu_seqlens_k, None, queries, keys)
    _check_prompts(mask)
    cu_seqlens = tuple(accumulate(real.sum(1).tolist(), initial=0))
    return Documents(cu_seqlens, cu_seqlens_k, queries, keys)


def _check_prompts(mask: Tensor) -> None:
    """Refuse what `generate` does with prompts that are padded on the right: the first token of
    such a row is drawn from the logits of its padding.
    """
    begins = mask[:, 1:] & ~mask[:, :-1] & mask[:, :-1].cummax(1).values
    if rows := begins.any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"row {rows[0]} has padding between its prompt and what follows in the cache: pad "
            'prompts on the left (tokenizer.padding_side = "left")'
        )


def _packed_between_padding(real: Tensor, position_ids: Tensor) -> bool:
    """Whether positions start again in a row, be they counted over real tokens or over all."""
    positions = position_ids.expand(real.shape)
    column = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    # The nearest real token at or before each column, -1 before the first.
    nearest = torch.where(real, column, -1).cummax(1).values
    before, here = nearest[:, :-1], positions[:, 1:]
    earlier = positions.gather(1, before.clamp(min=0))
    neighbours = before == column[:, :-1]
    wrong = torch.where(neighbours, here != earlier + 1, here <= earlier)
    return bool((wrong & real[:, 1:] & (before >= 0)).any())


def _from_positions(batch: int, q_len: int, k_len: int, position_ids: Tensor | None) -> Documents:
    rows = tuple(range(0, batch * q_len + 1, q_len)) if q_len else (0,) * (batch + 1)
    starts: list[list[int]] = []
    if position_ids is not None and q_len:
        breaks = (position_ids[:, 1:] != position_ids[:, :-1] + 1).nonzero()
        starts = [[row, column + 1] for row, column in breaks.tolist()]
    if k_len == q_len:
        if position_ids is not None and position_ids.shape[0] < batch:
            starts = [[row, column] for row in range(batch) for _, column in starts]
        inner = {row * q_len + column for row, column in starts}
        return Documents(tuple(sorted(inner.union(rows))) if inner else rows)
    if starts:
        row, column = starts[0]
        raise ValueError(
            f"position_ids do not go up by 1 at row {row}, token {column}, and {k_len - q_len} "
            "keys are cached: packed documents cannot continue from a cache; decode them as "
            "separate rows"
        )
    if position_ids is not None and q_len:
        last = int(position_ids[:, -1].min())
        if last + 1 < k_len:
            raise NotImplementedError(
                f"{k_len} keys, but the last query is at position {last}: the cache holds packed "
                "documents (decode them as separate rows), or is a static one in a compiled graph "
                "(pass the 2D attention_mask of the tokens so far)"
            )
    return Documents(rows, tuple(range(0, batch * k_len + 1, k_len)))


@dataclass(frozen=True)
class _Identity:
    """What a tensor reads: equal for two tensors on the same memory, whatever it holds.

    Memory and not the tensor object, because compiled graphs make a new view for every operator. A
    weak reference, because an address is used again once its memory is free.
    """

    storage: StorageWeakRef
    offset: int | torch.SymInt
    shape: torch.Size
    stride: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    version: int | None


@dataclass
class _Entry:
    """One found forward: the sizes and sources it was read from, and the layers that used it."""

    sizes: tuple[int, int, int]
    sources: tuple[_Identity | tuple[int, ...] | None, ...]
    documents: Documents
    used_by: set[int] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        return not any(
            isinstance(source, _Identity) and source.storage.expired() for source in self.sources
        )


class DocumentCache:
    """Documents of one model's recent forwards, found at their first layer.

    A forward hands the same tensors to each of its layers once. So an entry serves every layer
    once: when a layer asks again a new forward has begun, and documents are found again, whatever
    happened to the tensors in between (inference tensors, which Lightning validates with, do not
    count their changes). In backward, where activation checkpointing computes a layer again and a
    compiled graph asks once more, an entry serves as often as it is asked, provided that its
    tensors' version counters stand where they stood.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def find(
        self,
        layer: int,
        batch: int,
        q_len: int,
        k_len: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | Sequence[int] | None = None,
        cu_seq_lens_k: Tensor | Sequence[int] | None = None,
    ) -> Documents:
        """`find_documents` of these arguments, remembered; `layer` is who asks."""
        sizes = (batch, q_len, k_len)
        sources = tuple(
            _identity(source)
            for source in (attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        )
        entry = next((e for e in self._entries if (e.sizes, e.sources) == (sizes, sources)), None)
        if entry is not None and (in_backward() or layer not in entry.used_by):
            entry.used_by.add(layer)
            return entry.documents
        documents = find_documents(
            batch,
            q_len,
            k_len,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
        )
        new = _Entry(sizes, sources, documents, {layer})
        others = [other for other in self._entries if other is not entry and other.alive]
        self._entries = [new, *others[: _REMEMBERED - 1]]
        return documents


def in_backward() -> bool:
    """Whether autograd is running: a layer is then computed again, by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _identity(source: Tensor | Sequence[int] | None) -> _Identity | tuple[int, ...] | None:
    if source is None:
        return None
    if not isinstance(source, Tensor):
        return tuple(source)
    return _Identity(
        StorageWeakRef(source.untyped_storage()),
        source.storage_offset(),
        source.shape,
        source.stride(),
        source.dtype,
        None if source.is_inference() else source._version,
    )
