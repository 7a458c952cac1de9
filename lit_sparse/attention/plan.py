"""What document lengths alone say about a selection: every tile, its budget and its list's layout.

All of it is host arithmetic on integers, so that no list length depends on data, nothing
synchronises with a device, and two calls on the same lengths share one plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_sparse.budget import Budget

Ints = NDArray[np.int64]

# Shares of a budget are decimals such as 0.1; their products with a count may miss a whole number
# by an ulp, and a bare floor or ceil would then move a whole block.
_ROUNDING = 1e-9

_SINK, _BASE, _LOCAL, _LATE, _DIAGONAL = range(5)


@dataclass(frozen=True)
class Plan:
    """The tiles of some documents under a budget, and how the list of each is laid out.

    A tile is `tile` consecutive queries of one document; its grid starts at the document's first
    query. The list of a tile is `[sink | base | local | late | diagonal]`: the first three are
    blocks whose keys all lie before the tile and that all its rows see, ascending; a late block is
    seen from its entry row on; the diagonal blocks reach into the tile and need the causal mask.

    All arrays are int64 [tiles] unless said otherwise, in document order then position.
    """

    tile: int
    block: int
    queries: tuple[int, ...]
    """First query of each document in the packed row, and the total: the host's cu_seqlens."""
    keys: tuple[int, ...]
    """The same for keys."""
    document: Ints
    start: Ints
    """Document position of the tile's first row (t0)."""
    rows: Ints
    """Rows of the tile that exist: `tile`, or fewer where the document ends."""
    complete: Ints
    """Blocks complete before the tile starts: those that its rows may score."""
    counts: Ints
    """[tiles, 5]: list slots of each kind, in list order."""
    first_local: Ints
    """First block of the local window; the candidates lie between the sink and it."""
    sparse: NDArray[np.bool_]
    """Whether the tile drops anything. Where it does not, its list is every visible block."""
    raised_to: int
    """Keys of the largest always-kept set that overrode a smaller budget, 0 if none did."""
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What backends derive from the plan and keep with it."""

    @property
    def tiles(self) -> int:
        return len(self.start)

    @property
    def keeps_everything(self) -> bool:
        return not bool(self.sparse.any())

    @property
    def chooses(self) -> bool:
        """Whether data has a say in the lists."""
        return bool(self.counts[:, [_BASE, _LATE]].any())

    @property
    def full(self) -> Ints:
        """Blocks of each list that every row sees whole: sink, base and local."""
        return self.counts[:, : _LOCAL + 1].sum(1)

    @property
    def base(self) -> Ints:
        return self.counts[:, _BASE]

    @property
    def late(self) -> Ints:
        return self.counts[:, _LATE]

    @cached_property
    def offsets(self) -> Ints:
        """int64 [tiles + 1]: where each list starts."""
        return _starts(self.counts.sum(1))

    @cached_property
    def row_start(self) -> Ints:
        """Packed index of each tile's first query."""
        document_start = np.asarray(self.queries[:-1], dtype=np.int64)
        return document_start[self.document] + self.start - self.context[self.document]

    @cached_property
    def first_tile(self) -> Ints:
        """int64 [documents + 1]: the first tile of each document."""
        return _starts(-(-np.diff(self.queries) // self.tile))

    @cached_property
    def first_block(self) -> Ints:
        """int64 [documents + 1]: the first key block of each document, over all documents."""
        return _starts(-(-np.diff(self.keys) // self.block))

    @cached_property
    def context(self) -> Ints:
        """int64 [documents]: keys before the first query (cached ones)."""
        return np.diff(self.keys) - np.diff(self.queries)

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """int32 columns, -1 in the slots that data decides; places of base and late slots."""
        lengths = self.counts.ravel()
        first = np.zeros_like(self.counts)
        first[:, _LOCAL] = self.first_local
        first[:, _DIAGONAL] = self.complete
        within = np.arange(lengths.sum()) - np.repeat(_starts(lengths)[:-1], lengths)
        columns = np.repeat(first.ravel(), lengths) + within
        kind = np.repeat(np.tile(np.arange(5), self.tiles), lengths)
        chosen = (kind == _BASE) | (kind == _LATE)
        columns[chosen] = -1
        return (
            torch.from_numpy(columns.astype(np.int32)),
            torch.from_numpy(np.flatnonzero(kind == _BASE)),
            torch.from_numpy(np.flatnonzero(kind == _LATE)),
        )

    def on_device(self, name: str, device: torch.device) -> Tensor:
        """One of the arrays, int64 on a device: copied there once, and nothing waits for it."""
        found = self.cache.get((name, device))
        if found is None:
            found = to_device(getattr(self, name), device)
            self.cache[name, device] = found
        return found

    @property
    def lengths(self) -> Ints:
        """Slots of each list."""
        return self.counts.sum(1)

    @property
    def tile_first_block(self) -> Ints:
        """The first block of each tile's document, over all documents."""
        return self.first_block[self.document]

    @property
    def columns(self) -> Tensor:
        """int32 [slots]: the lists, -1 where base and late blocks will stand."""
        return self._slots[0]

    @property
    def base_slots(self) -> Tensor:
        return self._slots[1]

    @property
    def late_slots(self) -> Tensor:
        return self._slots[2]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy that nothing waits for, to keep with a plan."""
    # Outside of inference mode, so that training may use what validation has made.
    with torch.inference_mode(False):
        host = torch.from_numpy(np.ascontiguousarray(array))
        if device.type != "cuda":
            return host.to(device)
        # A copy from memory that is not pinned waits for all that the device has to do.
        return host.pin_memory().to(device, non_blocking=True)


def late_rows(late: int, tile: int) -> list[int]:
    """The rows at which `late` slots are filled: evenly spaced, several a row if need be."""
    return [(2 * slot + 1) * tile // (2 * late) for slot in range(late)]


@lru_cache(maxsize=64)
def make_plan(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    budget: Budget,
    block: int,
    tile: int,
    window: int | None = None,
) -> Plan:
    """The plan of documents whose packed boundaries are `queries` and `keys` (cu_seqlens).

    The lists of a tile follow from its nominal end `t0 + tile` even where the document ends
    earlier: what a longer document would hold after a token must not change what the token sees.
    With a `window` they are the blocks that hold a key of some row's window, whatever the budget.
    """
    key_lengths = np.diff(keys)
    tiles_of = -(-np.diff(queries) // tile)
    document = np.repeat(np.arange(len(tiles_of)), tiles_of)
    index = np.arange(len(document)) - np.repeat(_starts(tiles_of)[:-1], tiles_of)
    start = (key_lengths - np.diff(queries))[document] + index * tile
    end = start + tile

    if window is None:
        k = budget(torch.from_numpy(end)).numpy()
        local = np.ceil(budget.local * np.maximum(k - budget.sink, 0) - _ROUNDING).astype(np.int64)
        local, sinks = np.maximum(local, tile + block), -(-budget.sink // block)
        wanted = -(-k // block)
    else:
        # The first row's window reaches the furthest back, to t0 - window + 1.
        local, sinks, wanted = np.full_like(start, window - 1), 0, np.zeros_like(start)

    visible = -(-end // block)
    complete = start // block
    first_local = np.maximum(start - local, 0) // block
    sink = np.minimum(sinks, first_local)
    always = sink + visible - first_local
    kept = np.maximum(wanted, always)
    sparse = kept < visible
    chosen = np.where(sparse, kept - always, 0)
    late = np.floor(budget.late * chosen + _ROUNDING).astype(np.int64)

    # A list that keeps everything is all "local": one run from the first block on.
    first_local = np.where(sparse, first_local, 0)
    sink = np.where(sparse, sink, 0)
    length = key_lengths[document]
    existing = -(-np.minimum(end, length) // block)
    counts = np.stack(
        [sink, chosen - late, complete - first_local, late, existing - complete], axis=1
    ).astype(np.int64)
    raised = sparse & (wanted < always) & (window is None)
    return Plan(
        tile=tile,
        block=block,
        queries=queries,
        keys=keys,
        document=document,
        start=start,
        rows=np.minimum(tile, length - start),
        complete=complete,
        counts=counts,
        first_local=first_local,
        sparse=sparse,
        raised_to=int((always * block)[raised].max(initial=0)),
    )


def _starts(lengths: Ints) -> Ints:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
