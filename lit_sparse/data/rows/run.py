"""The rows of a whole run: the store that each comes from, and its number in that store's index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lit_sparse.data.cache import cached
from lit_sparse.data.rows.epochs import Demand
from lit_sparse.data.rows.index import RowIndex, build_rows
from lit_sparse.data.rows.mixture import schedule
from lit_sparse.data.stores.store import TokenStore

if TYPE_CHECKING:
    from lit_sparse.training.curriculum import Curriculum

_VERSION = 2
"""Part of every cache key: raise it when the same key gives other rows."""


NOTICEABLE_FILLER = 0.05
"""Share of a stage's tokens that only fill rows up, from which the description says what to do."""


@dataclass(frozen=True)
class Packing:
    """How documents become rows.

    Args:
        row_tokens: tokens of a row.
        rows_per_step: rows of an optimizer step over all ranks.
        method: "best_fit" places pieces whole, or "concat", one after the other, cut at row ends.
        prefer_long: long stages take the long documents.
        upsample: (tokens, times): documents of at least so many tokens come so often in an epoch.
        validation_fraction: share of the documents that is kept apart.
        seed: of the order and the packing.
        split_seed: of the split.
    """

    row_tokens: int
    rows_per_step: int
    method: Literal["best_fit", "concat"]
    prefer_long: bool
    upsample: tuple[int, float] | None
    validation_fraction: float
    seed: int
    split_seed: int


class RunIndex:
    """All rows of a run, memory-mapped: a look-up by row number, whatever the ranks or workers.

    Args:
        stores: the stores of the mixture.
        indices: the row index of each; None for one that no stage draws from.
        schedule: folder of the arrays `store` (uint16 [rows]), `number` (int64 [rows], row of that
            store's index) and `step_tokens` (int64 [steps]).
        rows_per_step: rows of an optimizer step.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        indices: Sequence[RowIndex | None],
        schedule: Path,
        rows_per_step: int,
    ) -> None:
        self.stores, self.indices = list(stores), list(indices)
        self.folder, self.rows_per_step = schedule, rows_per_step

    def __len__(self) -> int:
        """Rows."""
        return len(self.store)

    def __getstate__(self) -> dict[str, Any]:
        # Not the arrays: a spawned worker maps them again.
        mapped = ("store", "number", "step_tokens")
        return {key: value for key, value in self.__dict__.items() if key not in mapped}

    @cached_property
    def store(self) -> np.ndarray:
        return np.load(self.folder / "store.npy", mmap_mode="r")

    @cached_property
    def number(self) -> np.ndarray:
        return np.load(self.folder / "number.npy", mmap_mode="r")

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """Loss tokens of each optimizer step, over all ranks and accumulations: int64 [steps]."""
        return np.load(self.folder / "step_tokens.npy", mmap_mode="r")

    def find(self, row: int) -> tuple[int, RowIndex, int]:
        """The store's place in the mixture, its row index, and the row's number in that."""
        source = int(self.store[row])
        index = self.indices[source]
        assert index is not None
        return source, index, int(self.number[row])

    def describe(self, names: Sequence[str], curriculum: Curriculum) -> list[str]:
        """A line for each stage and store: how much of it is as long as the stage asks for."""
        lines = []
        first = 0
        for i, end in enumerate(curriculum.ends):
            for name, index in zip(names, self.indices, strict=True):
                if index is not None and index.summary["stages"][i]["rows"]:
                    owner = f" {name}:" if len(names) > 1 else ""
                    lines.append(f"steps {first} to {end - 1}:{owner} {_describe(index, i)}")
            first = end
        return lines

    @classmethod
    def build(
        cls,
        stores: Mapping[str, TokenStore],
        weights: np.ndarray,
        curriculum: Curriculum,
        packing: Packing,
        cache: str | Path | None = None,
    ) -> RunIndex:
        """The index of a run, from the cache if it was built before.

        Args:
            stores: name -> store.
            weights: share of each store in each stage's tokens, float [stages, stores].
            curriculum: steps and length of each stage.
            packing: how documents become rows.
            cache: see `cache_root`.

        Raises:
            ValueError: no document of the stores is as long as a stage (only text is asked: a
                conversation is never continued in another row); the message names the stage's key.
        """
        _check_lengths(stores, weights, curriculum, packing)
        rows = np.array([stage.steps * packing.rows_per_step for stage in curriculum.stages])
        names = list(stores)
        of_row = schedule(weights, rows)
        of_stage = np.split(of_row, np.cumsum(rows)[:-1])
        indices: list[RowIndex | None] = []
        keys: list[str | None] = []
        for i, store in enumerate(stores.values()):
            demand = [
                Demand(stage.length, int(np.count_nonzero(part == i)))
                for stage, part in zip(curriculum.stages, of_stage, strict=True)
            ]
            if not any(part.rows for part in demand):
                indices.append(None)
                keys.append(None)
                continue
            folder = _store_rows(names[i], store, demand, packing, cache)
            indices.append(RowIndex.open(folder))
            keys.append(folder.name)

        def write(out: Path) -> None:
            number = np.zeros(len(of_row), dtype=np.int64)
            loss = np.zeros(len(of_row), dtype=np.int64)
            for i, index in enumerate(indices):
                if index is not None:
                    at = np.flatnonzero(of_row == i)
                    number[at] = np.arange(len(at))
                    loss[at] = index.loss_tokens
            out.mkdir(parents=True)
            np.save(out / "store.npy", of_row)
            np.save(out / "number.npy", number)
            np.save(out / "step_tokens.npy", loss.reshape(-1, packing.rows_per_step).sum(1))

        key = {
            "version": _VERSION,
            "stores": keys,
            "weights": np.asarray(weights).tolist(),
            "rows": rows.tolist(),
            "rows_per_step": packing.rows_per_step,
        }
        folder = cached("schedules", key, write, cache)
        return cls(list(stores.values()), indices, folder, packing.rows_per_step)


def _describe(index: RowIndex, number: int) -> str:
    stage = index.summary["stages"][number]
    tokens = stage["rows"] * index.row_tokens
    text = (
        f"{stage['full_tokens'] / tokens:.0%} of the tokens are in pieces of the full "
        f"{stage['length']:,}, {stage['rows']:,} rows to epoch {stage['epochs']:.2f}"
    )
    filler = stage["filler_tokens"] / tokens
    if filler:
        text += f", {filler:.2%} filler"
    if filler > NOTICEABLE_FILLER:
        text += " (less if the stage's length divides data.row_tokens; none with packing: concat)"
    if stage["documents_truncated"]:
        text += (
            f", {stage['documents_truncated']:,} conversations truncated by "
            f"{stage['tokens_truncated']:,} tokens"
        )
    return text


def _store_rows(
    name: str,
    store: TokenStore,
    demand: Sequence[Demand],
    packing: Packing,
    cache: str | Path | None,
) -> Path:
    key = {
        "version": _VERSION,
        "store": store.fingerprint,
        "demand": [[part.length, part.rows] for part in demand],
        "row_tokens": packing.row_tokens,
        "packing": packing.method,
        "prefer_long": packing.prefer_long,
        "upsample": packing.upsample,
        "validation_fraction": packing.validation_fraction,
        "seed": packing.seed,
        "split_seed": packing.split_seed,
    }

    def write(out: Path) -> None:
        training, _ = store.split(packing.validation_fraction, packing.split_seed)
        build_rows(
            out,
            store.lengths,
            training,
            demand,
            packing.row_tokens,
            packing=packing.method,
            seed=packing.seed,
            truncate=store.kind == "chat",
            prefer_long=packing.prefer_long,
            upsample=packing.upsample,
            count_loss=loss_counter(store),
        )

    return cached("rows", key, write, cache)


def loss_counter(store: TokenStore) -> Any:
    """`count_loss` of `build_rows` for a store; None where all tokens but a piece's first count."""
    if store.kind == "text":
        return None

    def count(documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(documents), dtype=np.int64)
        for i, document in enumerate(documents.tolist()):
            if document >= 0:
                mask = store.loss_mask(document, int(starts[i]), int(lengths[i]))
                counts[i] = np.count_nonzero(mask[1:]) if mask is not None else lengths[i] - 1
        return counts

    return count


def _check_lengths(
    stores: Mapping[str, TokenStore],
    weights: np.ndarray,
    curriculum: Curriculum,
    packing: Packing,
) -> None:
    longest = []
    for store in stores.values():
        training, _ = store.split(packing.validation_fraction, packing.split_seed)
        longest.append(store.lengths[training].max(initial=0) if store.kind == "text" else np.inf)
    for i, stage in enumerate(curriculum.stages):
        there = max(length for length, weight in zip(longest, weights[i], strict=True) if weight)
        if stage.length > there:
            raise ValueError(
                f"curriculum.stages[{i}].length = {stage.length} tokens, but the longest training "
                f"document of data.path has {there} (all documents "
                f"{sum(store.tokens for store in stores.values())}), so the stage would not train "
                "longer contexts; shorten it or add longer documents"
            )
