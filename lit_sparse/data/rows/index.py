"""The row index: which pieces of which documents stand in which row of the run.

All rows of a store are decided at once, from document lengths, the stages and a seed. Nothing is
drawn while the run goes on, so the batch of an optimizer step is a look-up, whatever the ranks,
workers or restarts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_sparse.data.rows.epochs import Demand, Supply
from lit_sparse.data.rows.packing import PACKINGS
from lit_sparse.data.rows.writer import COLUMNS, FILLER, CountLoss, RowWriter


@dataclass(frozen=True)
class RowIndex:
    """Pieces of documents, row by row. One that was opened pickles as its path.

    Args:
        row_offsets: int64 [rows + 1]; the pieces of row r are `row_offsets[r]:row_offsets[r + 1]`.
        documents: int64 [pieces], number of the document, or `FILLER`.
        starts: int64 [pieces], first token of the piece, counted in its document.
        lengths: int64 [pieces], tokens of the piece, at least 1.
        loss_tokens: int64 [rows], labels of each row: a piece of m tokens predicts m - 1 of them.
        row_tokens: tokens of every row.
        summary: what `build_rows` counted.
        path: the directory that it was opened from.
    """

    row_offsets: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    loss_tokens: np.ndarray
    row_tokens: int
    summary: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def open(cls, path: Path | str) -> RowIndex:
        """Map the directory that `build_rows` wrote into memory.

        Raises:
            ValueError: it holds no row index, or a part of one.
        """
        path = Path(path)
        try:
            columns = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
            summary = json.loads((path / "rows.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} holds no complete row index ({error}); delete it and it is made again"
            ) from error
        return cls(**columns, row_tokens=summary["row_tokens"], summary=summary, path=path)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.path is None:
            return super().__reduce_ex__(protocol)
        return RowIndex.open, (self.path,)

    def __len__(self) -> int:
        """Rows."""
        return len(self.row_offsets) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, starts and lengths of the pieces of a row, in order."""
        at = slice(self.row_offsets[row], self.row_offsets[row + 1])
        return self.documents[at], self.starts[at], self.lengths[at]

    def full_share(self, length: int, rows: slice = slice(None)) -> float:
        """Share of the tokens of some rows that stand in a piece of at least `length` tokens."""
        first, last, _ = rows.indices(len(self))
        at = slice(self.row_offsets[first], self.row_offsets[last])
        lengths = self.lengths[at]
        full = lengths[(lengths >= length) & (self.documents[at] != FILLER)]
        return float(full.sum() / max(lengths.sum(), 1))

    def describe(self) -> str:
        """A line a stage: how much of it is as long as it asks for, what was cut and left free."""
        lines = []
        for number, stage in enumerate(self.summary.get("stages", [])):
            tokens = max(stage["rows"] * self.row_tokens, 1)
            line = (
                f"stage {number}: {stage['rows']:,} rows, to epoch {stage['epochs']:.2f}, "
                f"{stage['full_tokens'] / tokens:.1%} of the tokens in pieces of the full "
                f"{stage['length']:,}, {stage['filler_tokens'] / tokens:.2%} filler, "
                f"{stage['cuts']:,} cuts, {stage['documents_cut']:,} of documents that would fit"
            )
            if stage["documents_truncated"]:
                line += (
                    f", {stage['documents_truncated']:,} documents truncated by "
                    f"{stage['tokens_truncated']:,} tokens"
                )
            lines.append(line)
        return "\n".join(lines)


def build_rows(
    out: Path | str,
    lengths: np.ndarray,
    documents: np.ndarray,
    demand: Sequence[Demand],
    row_tokens: int,
    *,
    packing: str = "best_fit",
    seed: int,
    truncate: bool = False,
    prefer_long: bool = True,
    upsample: tuple[int, float] | None = None,
    count_loss: CountLoss | None = None,
) -> None:
    """Write the row index of one store: all rows that the stages ask of it.

    The stages consume the documents epoch by epoch; `epochs.Supply` says in which order, and the
    functions of `packing` how they become rows. Within an epoch no token is given twice, and over
    a whole epoch none is left out. Memory does not grow with the rows or the epochs. The result is
    a function of the arguments, the same bytes everywhere.

    Args:
        out: directory to write, made if missing; it is complete when the function returns.
        lengths: tokens of every document of the store [documents of the store].
        documents: numbers of the documents to use, int64.
        demand: the stages in order.
        row_tokens: tokens of a row, at least the longest stage.
        packing: "best_fit" or "concat".
        seed: of the order; not negative.
        truncate: a document longer than the stage's length gives its first `length` tokens only.
            The packing is "best_fit" then, whatever `packing` says.
        prefer_long: whether long stages choose long documents.
        upsample: `(longer_than, times)`: documents of at least `longer_than` tokens stand `times`
            as often in an epoch.
        count_loss: loss tokens of pieces; None: length - 1. Called with many pieces at once, never
            with filler.

    Raises:
        ValueError: an argument is out of its range, there is no token, or no document is as long as
            a stage; the message names the key.
    """
    supply = Supply(
        lengths,
        documents,
        demand,
        row_tokens,
        seed=seed,
        prefer_long=prefer_long,
        truncate=truncate,
        upsample=upsample,
    )
    _check(supply, packing)
    packing = "best_fit" if truncate else packing
    writer = RowWriter(Path(out), lengths, row_tokens, truncate, count_loss)
    for number, stage in enumerate(demand):
        for row, pieces in PACKINGS[packing](supply, number):
            writer.append(row, pieces, stage.length)
        writer.end_stage(stage, supply.epochs)
    writer.close({"packing": packing, "seed": seed})


def _check(supply: Supply, packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"data.packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
    if supply.upsample is not None and supply.upsample[1] < 1:
        raise ValueError(f"data.upsample: times must be >= 1, got {supply.upsample[1]}")
    used = supply.lengths[supply.documents]
    if not used.any():
        raise ValueError("the training documents of data.path hold no token")
    for i, stage in enumerate(supply.demand):
        where = f"curriculum.stages[{i}].length = {stage.length} tokens"
        if not 1 <= stage.length <= supply.row_tokens:
            raise ValueError(f"{where}, must be in [1, data.row_tokens = {supply.row_tokens}]")
