"""Writes a row index: columns that grow on disk, and what there is to say about each stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from lit_sparse.data.rows.epochs import Demand, Runs

FILLER = -1
"""Document number of tokens that only fill a row up; they carry no label."""

COLUMNS = ("row_offsets", "documents", "starts", "lengths", "loss_tokens")

CountLoss = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Documents, starts and lengths of pieces, int64 [pieces] each -> their loss tokens, int64."""


class RowWriter:
    """The directory of one row index, written chunk by chunk.

    Args:
        out: directory, made if missing.
        lengths: tokens of every document of the store.
        row_tokens: tokens of a row.
        truncate: whether what follows a piece in its document is left out.
        count_loss: loss tokens of pieces that are no filler; None: length - 1.
    """

    def __init__(
        self,
        out: Path,
        lengths: np.ndarray,
        row_tokens: int,
        truncate: bool,
        count_loss: CountLoss | None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.lengths, self.row_tokens = out, lengths, row_tokens
        self.truncate, self.count_loss = truncate, count_loss
        self.columns = {name: _Column(out / f"{name}.npy") for name in COLUMNS}
        self.columns["row_offsets"].append(np.zeros(1, np.int64))
        self.stages: list[dict[str, Any]] = []
        self.counted = _nothing_counted()

    def append(self, row: np.ndarray, pieces: Runs, longest: int) -> None:
        """Add rows; what room they have is filled up by pieces of at most `longest` tokens.

        Args:
            row: row of each piece, from 0 and ascending, no row left out [pieces].
            pieces: see `Runs`.
            longest: the stage's length.
        """
        row, document, start, length = self._filled(row, pieces, longest)
        real = document != FILLER
        loss = np.where(real, length - 1, 0)
        if self.count_loss is not None:
            loss[real] = self.count_loss(document[real], start[real], length[real])
        ends = np.searchsorted(row, np.arange(1, row[-1] + 2))
        loss_before = np.append(0, np.cumsum(loss))[np.append(0, ends)]
        columns = self.columns
        columns["row_offsets"].append(columns["documents"].size + ends)
        columns["documents"].append(document)
        columns["starts"].append(start)
        columns["lengths"].append(length)
        columns["loss_tokens"].append(np.diff(loss_before))

        counted = self.counted
        counted["filler_tokens"] += int(length[~real].sum())
        whole, start, length = self.lengths[document[real]], start[real], length[real]
        counted["full_tokens"] += int(length[length >= longest].sum())
        if self.truncate:
            counted["documents_truncated"] += int(np.count_nonzero(length < whole))
            counted["tokens_truncated"] += int((whole - length).sum())
        else:
            counted["cuts"] += int(np.count_nonzero(start))
            begun = (start == 0) & (length < whole)
            counted["documents_cut"] += int(np.count_nonzero(begun & (whole <= longest)))

    def end_stage(self, stage: Demand, epochs: float) -> None:
        """Close the count of a stage, at whose end `epochs` epochs are used up."""
        asked = {"length": int(stage.length), "rows": int(stage.rows)}
        self.stages.append({**asked, "epochs": float(epochs), **self.counted})
        self.counted = _nothing_counted()

    def close(self, about: Mapping[str, Any]) -> None:
        for column in self.columns.values():
            column.close()
        summary = {"row_tokens": self.row_tokens, **about, "stages": self.stages}
        (self.out / "rows.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")

    def _filled(
        self, row: np.ndarray, pieces: Runs, longest: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        room = self.row_tokens - np.bincount(row, pieces.lengths).astype(np.int64)
        # Filler attends to itself: it is no longer than a document of the stage may be.
        count = -(-room // longest)
        owner = np.repeat(np.arange(len(room)), count)
        before = (np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)) * longest
        owners = np.concatenate([row, owner])
        order = np.argsort(owners, kind="stable") if len(owner) else slice(None)

        def column(values: np.ndarray, filler: np.ndarray) -> np.ndarray:
            return np.concatenate([values.astype(np.int64), filler])[order]

        return (
            owners[order],
            column(pieces.documents, np.full_like(owner, FILLER)),
            column(pieces.starts, np.zeros_like(owner)),
            column(pieces.lengths, np.minimum(room[owner] - before, longest)),
        )


def _nothing_counted() -> dict[str, int]:
    return {
        "full_tokens": 0,
        "filler_tokens": 0,
        "cuts": 0,
        "documents_cut": 0,
        "documents_truncated": 0,
        "tokens_truncated": 0,
    }


class _Column:
    """An int64 array in a `.npy` file that grows; its header is right when it is closed."""

    def __init__(self, path: Path) -> None:
        self.file, self.size = path.open("wb"), 0
        self._header()

    def append(self, values: np.ndarray) -> None:
        self.size += len(values)
        self.file.write(np.ascontiguousarray(values, dtype="<i8").data)

    def close(self) -> None:
        # numpy leaves room in a header for the shape to grow, so that it can be written over.
        self.file.seek(0)
        self._header()
        self.file.close()

    def _header(self) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.size,)}
        npy.write_array_header_1_0(self.file, header)
