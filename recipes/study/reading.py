"""A sparse model reads packed rows: each document's loss, what attention misses and reads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.attention.options import Options
from lit_sparse.attention.probe import probe_rows
from lit_sparse.data import Documents
from lit_sparse.models import dense_attention, law_layers, observe
from lit_sparse.models.head import language_head

BLOCK = TILE = SINK = 4
"""Tokens, of studies on short contexts: what is always kept is small beside the windows."""

LOCAL = 0.25
"""Share of a budget for the nearest keys, in these studies."""

LONGEST = 2048
"""Of a model with a longer context these studies use so much, in tokens."""

_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Row:
    """Documents packed into one row.

    Args:
        tokens: int64 [T].
        lengths: of the documents, in tokens; their sum is T.
        counted: bool [T], tokens whose loss counts; never the first of a document.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    counted: Tensor

    @classmethod
    def pack(cls, documents: Sequence[Tensor], counted: Sequence[Tensor] | None = None) -> Row:
        """From int64 [length] each, and bool [length] each; None: all tokens count."""
        lengths = tuple(map(len, documents))
        which = (
            torch.ones(sum(lengths), dtype=torch.bool)
            if counted is None
            else torch.cat(list(counted))
        )
        row = cls(torch.cat(list(documents)), lengths, which)
        which[row.positions == 0] = False
        return row

    @property
    def document(self) -> Tensor:
        """int64 [T]: the number of each token's document."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    @property
    def positions(self) -> Tensor:
        """int64 [T], from 0 in every document."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def pairs(self) -> int:
        """Causal pairs of a query and a key."""
        return sum(length * (length + 1) // 2 for length in self.lengths)


@dataclass(frozen=True)
class Reading:
    """What was found in one row.

    Args:
        loss: nats per counted token, float64 [documents].
        right: whether each counted token had the largest logit, [documents].
        keys: that a query's attention reads, mean over queries, heads and layers.
        missed, output_error: as `RowStatistics` has them, means over sampled rows, heads and
            layers, [documents]; NaN where no row was sampled.
    """

    loss: np.ndarray
    right: np.ndarray
    keys: float
    missed: np.ndarray
    output_error: np.ndarray


def mixture(shortest: int, longest: int) -> tuple[int, ...]:
    """Document lengths of one row: equally many tokens at every doubling from the shortest."""
    documents: list[int] = []
    length = shortest
    while length <= longest:
        documents += [length] * (longest // length)
        length *= 2
    return tuple(documents)


def random_pieces(
    documents: Documents, lengths: Sequence[int], rng: np.random.Generator
) -> list[Tensor]:
    """Text of each length from random places of random documents: int64 [length] each.

    Raises:
        ValueError: no document is so long.
    """
    sizes = documents.text_lengths
    pieces = []
    for length in lengths:
        eligible = np.flatnonzero(sizes >= length)
        if not len(eligible):
            raise ValueError(f"no document has {length} tokens, the longest has {sizes.max()}")
        number = int(rng.choice(eligible))
        start = int(rng.integers(sizes[number] - length + 1))
        piece = documents.read(number, start, length).astype(np.int64)
        pieces.append(torch.from_numpy(piece))
    return pieces


@torch.no_grad()
def read(model: Any, row: Row, sampled: Tensor | None = None) -> Reading:
    """Run a sparsified model on a row, under the law that it has.

    Args:
        sampled: int64 [R], ascending tokens whose attention is compared with the dense one.
    """
    layers = law_layers(model)
    found: list[Tensor] = []
    densities: list[float] = []

    def observer(layer: int, *seen: Any) -> None:
        q, k, v, out, lse = seen[:5]
        selection: Selection = seen[5]
        options: Options = seen[6]
        densities.append(selection.density)
        if sampled is not None:
            got = probe_rows(q, k, v, selection, sampled, options, out=out, lse=lse)
            found.append(torch.stack([got.tau.mean(1), got.output_error.mean(1)]))

    with observe(model, observer, layers), warnings.catch_warnings():
        # That a window is smaller than what is always kept; `keys` is what was read.
        warnings.filterwarnings("ignore", message=".*always kept", category=UserWarning)
        loss, right = _losses(model, row)
    keys = float(np.mean(densities)) * row.pairs / len(row.tokens)
    nothing = np.full(len(row.lengths), np.nan)
    missed, error = nothing, nothing
    if sampled is not None:
        means = torch.stack(found).double().mean(0)
        missed, error = (_by_document(values, row.document[sampled], row) for values in means)
    return Reading(loss, right, keys, missed, error)


@torch.no_grad()
def read_densely(model: Any, row: Row) -> Reading:
    """The same model with dense attention: misses nothing, and reads every key."""
    with dense_attention(model):
        loss, right = _losses(model, row)
    zero = np.zeros(len(row.lengths))
    return Reading(loss, right, row.pairs / len(row.tokens), zero, zero)


def _losses(model: Any, row: Row) -> tuple[np.ndarray, np.ndarray]:
    device = model.device
    hidden = model.base_model(
        input_ids=row.tokens[None].to(device),
        position_ids=row.positions[None].to(device),
        use_cache=False,
    )[0][0]
    head = language_head(model)
    counted = row.counted.nonzero()[:, 0]
    loss, right = [], []
    for part in counted.split(_LOGIT_ROWS):
        # The token before predicts it.
        logits = head(hidden[part.to(device) - 1]).float().cpu()
        loss.append(F.cross_entropy(logits, row.tokens[part], reduction="none"))
        right.append(logits.argmax(-1) == row.tokens[part])
    document = row.document[counted]
    share = _by_document(torch.cat(right), document, row)
    return _by_document(torch.cat(loss), document, row), share == 1


def _by_document(values: Tensor, document: Tensor, row: Row) -> np.ndarray:
    """Means over each document's own: float64 [documents], NaN where it has none."""
    count = len(row.lengths)
    where = document.numpy()
    total = np.bincount(where, values.double().numpy(), minlength=count)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / np.bincount(where, minlength=count))
