"""From the row index to batches: the datasets and samplers behind the data loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_sparse.data.documents import Documents
from lit_sparse.data.rows.index import FILLER, RowIndex
from lit_sparse.data.rows.run import RunIndex, loss_counter
from lit_sparse.data.rows.validation import count_fixed_rows, fixed_rows
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.tasks.planting import Planting

IGNORED = -100
"""Label of a token that has nothing to predict."""

Batch = dict[str, Tensor]


def assemble(
    store: TokenStore,
    rows: RowIndex,
    row: int,
    planting: Planting | None = None,
    seed: int | tuple[int, ...] = 0,
) -> Batch:
    """Assemble one row.

    Args:
        store: the documents of the row index.
        rows: the row index.
        row: number of the row.
        planting: the tasks that pieces carry; drawn from (seed, row, number of the piece), so that
            a row is the same whoever assembles it.
        seed: not negative.

    Returns:
        input_ids, position_ids (from 0 in each piece) and labels (the next token of the same piece
        if it is one to learn, or -100: already shifted), int64 [1, row_tokens] each.
    """
    ids = np.empty(rows.row_tokens, dtype=np.int64)
    positions = np.empty_like(ids)
    labels = np.full_like(ids, IGNORED)
    drawn = (*seed, row) if isinstance(seed, tuple) else (seed, row)
    at = 0
    for number, (document, start, length) in enumerate(zip(*rows.pieces(row), strict=True)):
        piece = slice(at, at + length)
        if document == FILLER:
            ids[piece] = store.eos_id
        else:
            tokens = store.read(document, start, length)
            mask = store.loss_mask(document, start, length)
            if planting is not None:
                tokens = planting.plant(tokens, np.random.default_rng((*drawn, number)))
            ids[piece] = tokens
            following = ids[at + 1 : at + length]
            labels[at : at + length - 1] = (
                following if mask is None else np.where(mask[1:], following, IGNORED)
            )
        positions[piece] = np.arange(length)
        at += length
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {key: torch.from_numpy(values)[None] for key, values in batch.items()}


class TrainingRows(Dataset[Batch]):
    """Row number -> batch. `step_tokens` is of the whole optimizer step that the row belongs to.

    Tasks are planted in text only.
    """

    def __init__(self, run: RunIndex, planting: Planting | None = None, seed: int = 0) -> None:
        self.run, self.planting, self.seed = run, planting, seed

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, row: int) -> Batch:
        source, index, number = self.run.find(row)
        store = self.run.stores[source]
        planting = self.planting if store.kind == "text" else None
        batch = assemble(store, index, number, planting, (self.seed, source))
        step_tokens = self.run.step_tokens[row // self.run.rows_per_step]
        return {
            **batch,
            "step_tokens": torch.tensor(int(step_tokens)),
            "source": torch.tensor(source),
        }


class TrainingSampler(Sampler[int]):
    """Row numbers of one rank, step by step from `start_step` to the end of the run.

    Step s is the rows from `s * rows_per_step` on, of which rank r of W takes a run of
    `rows_per_step / W`.

    Args:
        rows: rows of the run.
        rows_per_step: rows of an optimizer step, a multiple of `world`.
        rank, world: this rank and the number of data-parallel ranks.
        start_step: optimizer steps that are done.
        counted: batches of steps done that the length still counts (Lightning compares its counter
            of batches, which a resumed run restores, with the length of the loader).
    """

    def __init__(
        self,
        rows: int,
        rows_per_step: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        counted: int = 0,
    ) -> None:
        self.steps = range(min(start_step, rows // rows_per_step), rows // rows_per_step)
        self.rows_per_step, self.rank, self.counted = rows_per_step, rank, counted
        self.share = rows_per_step // world

    def __len__(self) -> int:
        return self.counted + len(self.steps) * self.share

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            first = step * self.rows_per_step + self.rank * self.share
            yield from range(first, first + self.share)


class ValidationRows(Dataset[Batch]):
    """(length, row number) -> batch, with `step_tokens`, the row's own loss tokens.

    The row index of a length is built when it is first asked for, in the process that asks.

    Args:
        documents: of each store of the mixture, those that are kept for validation.
        shares: rows wanted of each store.
        row_tokens: tokens of a row.
        seed: of the choice.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        shares: Sequence[int],
        row_tokens: int,
        seed: int,
    ) -> None:
        self.documents, self.row_tokens, self.seed = list(documents), row_tokens, seed
        self.counts = [
            count_fixed_rows(int(held.lengths.sum()), row_tokens, share) if share else 0
            for held, share in zip(documents, shares, strict=True)
        ]
        # Spread, so that the first rows, or those of a rank, are not of one store.
        self.places = sorted(
            ((number + 0.5) / count, source, number)
            for source, count in enumerate(self.counts)
            for number in range(count)
        )
        self.indices: dict[tuple[int, int], RowIndex] = {}

    def __len__(self) -> int:
        return len(self.places)

    def find(self, length: int, row: int) -> tuple[int, RowIndex, int]:
        """The store's place in the mixture, its row index, and the row's number in that."""
        _, source, number = self.places[row]
        if (length, source) not in self.indices:
            held = self.documents[source]
            self.indices[length, source] = fixed_rows(
                held.store.lengths,
                held.numbers,
                length,
                self.row_tokens,
                self.counts[source],
                self.seed,
                truncate=held.store.kind == "chat",
                count_loss=loss_counter(held.store),
            )
        return source, self.indices[length, source], number

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        source, index, number = self.find(*key)
        return {
            **assemble(self.documents[source].store, index, number),
            "step_tokens": torch.tensor(int(index.loss_tokens[number])),
            "source": torch.tensor(source),
        }


class ValidationSampler(Sampler[tuple[int, int]]):
    """Keys of `ValidationRows` for one rank, at the `length()` of the moment when a pass starts.

    It lives in the main process, so a change of length reaches workers that run already. Every rank
    gets as many rows; what is left over is dropped.
    """

    def __init__(self, rows: int, length: Callable[[], int], rank: int = 0, world: int = 1) -> None:
        self.share, self.rank, self.length = rows // world, rank, length

    def __len__(self) -> int:
        return self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        length = self.length()
        for row in range(self.rank * self.share, (self.rank + 1) * self.share):
            yield length, row


class RowLoader(DataLoader[Batch]):
    """A data loader whose place is the optimizer step: it has no state of its own to save.

    It says so by the two methods that Lightning looks for before it warns, when a run resumes, that
    the loader would start over.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass
