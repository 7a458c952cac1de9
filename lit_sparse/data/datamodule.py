"""The LightningDataModule: a corpus as packed rows, in the order that the row index decided."""

from __future__ import annotations

import hashlib
import json
import math
import signal
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lit_sparse.data.corpora import choose_tokenizer, divide, open_stores, stage_weights
from lit_sparse.data.documents import Documents
from lit_sparse.data.loading import (
    Batch,
    RowLoader,
    TrainingRows,
    TrainingSampler,
    ValidationRows,
    ValidationSampler,
)
from lit_sparse.data.rows.run import Packing, RunIndex
from lit_sparse.data.stores.store import TokenStore, unigram_bits
from lit_sparse.data.tasks.planting import Planting, check_shares
from lit_sparse.data.tokenizer import Tokenizer
from lit_sparse.distributed import ranks_of
from lit_sparse.training.curriculum import Curriculum


class PackedTextDataModule(LightningDataModule):
    """Text packed into rows of equal size, cut to the context length of the curriculum's stage.

    A batch is one row: `input_ids`, `position_ids` and `labels` (already shifted, -100 where there
    is nothing to predict), int64 [1, row_tokens]; `step_tokens`, an int64 scalar: the loss tokens
    of the whole optimizer step over all ranks and accumulations (in validation those of the row);
    and `source`, an int64 scalar: the place in `path` of the store that the row is from.

    One epoch of the trainer is the whole run of the curriculum. `setup` sets the trainer's
    `accumulate_grad_batches` to the rows of a step that fall to one rank, and `max_steps`, where it
    was left open, to the end of the curriculum. Ranks are those of
    `trainer.distributed_sampler_kwargs`, so a strategy whose ranks share samples (sequence
    parallelism) says so there.

    Stores are memory-mapped. A corpus that is not packed yet is packed into the cache; so are the
    rows of the run, decided once from stores, curriculum, seed and packing.

    Args:
        path: a store of `lit-sparse pack`, "stdlib" (Python's own source), a folder or file that
            `lit-sparse pack` reads, or several of them with their shares of the tokens.
        tokenizer: "bytes", a local Hugging Face directory, or None for the store's own (for a
            corpus that is not packed yet that of `pretrained`, else bytes).
        row_tokens: tokens of a row, at least the curriculum's longest stage.
        rows_per_step: rows of an optimizer step over all ranks, a multiple of their number.
        packing: "best_fit" places pieces whole and fills what stays free; "concat" cuts them where
            a row ends.
        prefer_long: long stages take the long documents.
        upsample_longer_than, upsample_times: documents of at least so many tokens come so often in
            an epoch. None: all come once.
        validation_fraction: share of the documents that is kept for validation, in (0, 1).
        validation_rows: rows of a validation pass, at most (fewer if the documents hold less).
        tasks: names of `lit_sparse.data.tasks.TASKS` with the shares of the training pieces of text
            that carry them, together at most 1.
        task_recalls: how many statements, or questions with their answers, more such a piece holds.
        text_field: key or column of the text in records of a corpus that is not packed yet.
        seed: of the order and the tasks, and of the split.
        split_seed: of the split, where other seeds shall leave it as it is; None: `seed`.
        num_workers: processes that assemble rows; 0 is the training process itself.
        cache_dir: where packed corpora and rows are kept; None: $LIT_SPARSE_CACHE or the user's
            cache folder.
        curriculum: the stages of the run.
        block: keys of an attention block, to check stage lengths against; None checks nothing.
        pretrained: directory of the model that is fine-tuned, whose tokenizer the stores have to
            go with, see `lit_sparse.data.corpora.choose_tokenizer`; None for a new model.

    Raises:
        ValueError: a value is out of its range; the message names its key.
    """

    def __init__(
        self,
        path: str | dict[str, float] = "stdlib",
        tokenizer: str | None = None,
        row_tokens: int = 4096,
        rows_per_step: int = 1,
        packing: Literal["best_fit", "concat"] = "best_fit",
        prefer_long: bool = True,
        upsample_longer_than: int | None = None,
        upsample_times: float = 1.0,
        validation_fraction: float = 0.05,
        validation_rows: int = 8,
        tasks: dict[str, float] | None = None,
        task_recalls: int = 0,
        text_field: str = "text",
        seed: int = 0,
        split_seed: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        curriculum: Curriculum | None = None,
        block: int | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()

        def require(holds: bool, key: str, rule: str, value: object) -> None:
            if not holds:
                raise ValueError(f"data.{key} must be {rule}, got {value!r}")

        fraction = validation_fraction
        require(row_tokens >= 1, "row_tokens", ">= 1", row_tokens)
        require(rows_per_step >= 1, "rows_per_step", ">= 1", rows_per_step)
        require(packing in ("best_fit", "concat"), "packing", "best_fit or concat", packing)
        require(0 < fraction < 1, "validation_fraction", "in (0, 1)", fraction)
        require(validation_rows >= 1, "validation_rows", ">= 1", validation_rows)
        require(task_recalls >= 0, "task_recalls", ">= 0", task_recalls)
        require(1 <= upsample_times < math.inf, "upsample_times", ">= 1", upsample_times)
        longer = upsample_longer_than
        require(longer is None or longer >= 1, "upsample_longer_than", ">= 1 or null", longer)
        require(seed >= 0, "seed", ">= 0", seed)
        require(split_seed is None or split_seed >= 0, "split_seed", ">= 0 or null", split_seed)
        require(num_workers >= 0, "num_workers", ">= 0", num_workers)
        check_shares(tasks or {})
        self.path, self.tokenizer, self.text_field = path, tokenizer, text_field
        self.pretrained = pretrained
        self.packing = Packing(
            row_tokens=row_tokens,
            rows_per_step=rows_per_step,
            method=packing,
            prefer_long=prefer_long,
            upsample=None if longer is None else (longer, upsample_times),
            validation_fraction=fraction,
            seed=seed,
            split_seed=seed if split_seed is None else split_seed,
        )
        self.validation_rows = validation_rows
        self.tasks, self.task_recalls = dict(tasks or {}), task_recalls
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self.curriculum, self.block = curriculum, block
        self.start_step = 0
        """Optimizer step that training batches start at where no trainer is attached."""
        self.validation_length = curriculum.longest if curriculum is not None else row_tokens
        """Longest piece of the validation rows, in tokens. A change holds from the next pass on."""
        self._run: RunIndex | None = None

    # -- what there is --

    @property
    def row_tokens(self) -> int:
        return self.packing.row_tokens

    @property
    def rows_per_step(self) -> int:
        return self.packing.rows_per_step

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer object, loaded when first asked for: it needs no `setup`."""
        return choose_tokenizer(self.path, self.tokenizer, self.pretrained)

    @property
    def vocab_size(self) -> int:
        return self.text_tokenizer.vocab_size

    @cached_property
    def planting(self) -> Planting:
        """The tasks of the training pieces, in the tokens of this tokenizer."""
        return Planting(self.tasks, self.text_tokenizer, self.task_recalls)

    @cached_property
    def stores(self) -> dict[str, TokenStore]:
        """The stores by the names that `path` gives them; packed now if they are not yet."""
        return open_stores(self.path, self.text_tokenizer, self.text_field, self.cache_dir)

    @property
    def store_names(self) -> list[str]:
        """A short name of each store, for logs: the last part of its path where that tells it."""
        short = {path: Path(path).name or path for path in self.stores}
        names = list(short.values())
        return [name if names.count(name) == 1 else path for path, name in short.items()]

    @cached_property
    def validation_documents(self) -> list[Documents]:
        """Of each store, the documents that are kept for validation."""
        fraction, seed = self.packing.validation_fraction, self.packing.split_seed
        return [Documents(store, store.split(fraction, seed)[1]) for store in self.stores.values()]

    @property
    def validation_text(self) -> Documents:
        """The validation documents of the text with the largest share."""
        shares = self._weights()[-1]
        text = [d.store.kind == "text" for d in self.validation_documents]
        return self.validation_documents[int(np.argmax(np.where(text, shares, -1.0)))]

    @property
    def fingerprint(self) -> str:
        """What decides the tokens of every step: other data, another fingerprint."""
        parts = [store.fingerprint for store in self.stores.values()]
        settings = [asdict(self.packing), self._weights().tolist()]
        tasks = [*self.tasks.items(), self.task_recalls]
        stages = [(stage.length, stage.steps) for stage in self._curriculum().stages]
        text = json.dumps([parts, settings, tasks, stages], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def run(self) -> RunIndex:
        """All rows of the run. Built by `setup`."""
        if self._run is None:
            raise RuntimeError("PackedTextDataModule.setup() has not run")
        return self._run

    @cached_property
    def unigram_bits(self) -> float:
        """Bits per validation token of a model without context; see `unigram_bits`."""
        return unigram_bits(self.validation_text.store, self.validation_text.numbers)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of the text / its tokens (document ends not counted); 1.0 for bytes. None
        unless the data is one store of text: bits per byte of a mixture would mean nothing.
        """
        store = self.validation_text.store
        return store.bytes_per_token if len(self.stores) == 1 and store.kind == "text" else None

    @property
    def unigram_bits_per_byte(self) -> float | None:
        """None where `bytes_per_token` is."""
        return self.unigram_bits / self.bytes_per_token if self.bytes_per_token else None

    def describe(self) -> str:
        """What was read, and how much of each stage is as long as the stage asks for."""
        lines = []
        for name, held in zip(self.stores, self.validation_documents, strict=True):
            store = held.store
            lines.append(
                f"{name}: {len(store) - len(held):,} documents for training, {len(held):,} for "
                f"validation, {store.tokens:,} tokens, {store.manifest.skipped}"
            )
        if self._run is not None:
            lines += self._run.describe(self.store_names, self._curriculum())
        return "\n".join(lines)

    # -- Lightning --

    def setup(self, stage: str | None = None) -> None:
        """Open the stores and decide all rows (once), and fit the trainer's accumulation to them.

        Raises:
            ValueError: the corpus, the curriculum, the rows and the ranks do not go together; the
                message names the key to change.
        """
        curriculum = self._curriculum()
        _, world = self._place()
        self._check_world(world)
        if self._run is None:
            curriculum.check(row_tokens=self.row_tokens, block=self.block)
            weights = self._weights()
            self.planting.check(curriculum.longest)
            self._run = RunIndex.build(
                self.stores, weights, curriculum, self.packing, self.cache_dir
            )
        if len(self._validation_rows()) < world:
            raise ValueError(
                f"data.validation_rows = {self.validation_rows} and the validation documents make "
                f"{len(self._validation_rows())} row(s) of {self.row_tokens} tokens, fewer than "
                f"the {world} ranks; raise data.validation_fraction, data.validation_rows or both"
            )
        if self.trainer is not None and stage in (None, "fit"):
            self.adjust(self.trainer, world)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Rows from the trainer's global step (without one, `start_step`) to the run's end."""
        rank, world = self._place()
        self._check_world(world)
        start, counted = self.start_step, 0
        if self.trainer is not None:
            start = self.trainer.global_step
            counted = _align(self.trainer, start * self.rows_per_step // world)
        planting = self.planting if self.planting.tasks else None
        return self._loader(
            TrainingRows(self.run, planting, self.packing.seed),
            TrainingSampler(len(self.run), self.rows_per_step, rank, world, start, counted),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """`validation_rows` rows at `validation_length`, which each pass reads anew."""
        rank, world = self._place()
        rows = self._validation_rows()
        sampler = ValidationSampler(len(rows), lambda: self.validation_length, rank, world)
        return self._loader(rows, sampler)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The validation rows: no data is kept apart for a test."""
        return self.val_dataloader()

    # -- inside --

    def _curriculum(self) -> Curriculum:
        if self.curriculum is None:
            raise ValueError(
                "data.curriculum is not set: it decides how long the pieces of a row are"
            )
        return self.curriculum

    def _weights(self) -> np.ndarray:
        return stage_weights(self.path, self._curriculum())

    def _validation_rows(self) -> ValidationRows:
        return ValidationRows(
            self.validation_documents,
            divide(self.validation_rows, self._weights()[-1].tolist()),
            self.row_tokens,
            self.packing.seed,
        )

    def _place(self) -> tuple[int, int]:
        """This data-parallel rank, and how many there are."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    def _check_world(self, world: int) -> None:
        if self.rows_per_step % world:
            below = self.rows_per_step // world * world
            near = f"{below} and {below + world}" if below else f"{world}"
            raise ValueError(
                f"data.rows_per_step = {self.rows_per_step} cannot be divided among {world} "
                f"data-parallel ranks; the nearest that can: {near}"
            )
        sharers = ranks_of(self.trainer).sequence_size if self.trainer is not None else 1
        if self.row_tokens % sharers:
            below = self.row_tokens // sharers * sharers
            raise ValueError(
                f"data.row_tokens = {self.row_tokens} cannot be divided among the {sharers} ranks "
                f"that share a row (strategy.sequence_parallel); the nearest that can: {below} "
                f"and {below + sharers}"
            )
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if world > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ValueError(
                "trainer.use_distributed_sampler must be false: the rows are divided among the "
                "ranks already, and a second division would train on some of them only"
            )

    def adjust(self, trainer: Any, world: int) -> None:
        """Set a trainer's accumulation, on so many data-parallel ranks, and its end.

        Raises:
            ValueError: it would train on other rows than those of the curriculum's steps.
        """
        curriculum = self._curriculum()
        trainer.accumulate_grad_batches = self.rows_per_step // world
        if trainer.limit_train_batches != 1.0 and not trainer.fast_dev_run:
            raise ValueError(
                f"trainer.limit_train_batches = {trainer.limit_train_batches} (or overfit_batches) "
                "would train on the first rows again and again: one epoch is the whole run; for a "
                "shorter one set trainer.max_steps"
            )
        if trainer.max_steps == -1:
            trainer.fit_loop.epoch_loop.max_steps = curriculum.total_steps
        elif trainer.max_steps > curriculum.total_steps:
            raise ValueError(
                f"trainer.max_steps = {trainer.max_steps} goes past the end of the curriculum "
                f"({curriculum.total_steps} steps); leave it out, or lengthen curriculum.stages"
            )

    def _loader(self, dataset: Any, sampler: Any) -> DataLoader[Batch]:
        # Batches of one with a collate function that unwraps, rather than batch_size=None:
        # Lightning's DeepSpeed strategy reads `batch_sampler.batch_size`.
        return RowLoader(
            dataset,
            batch_size=1,
            sampler=sampler,
            collate_fn=_unwrap,
            num_workers=self.num_workers,
            worker_init_fn=_finish_the_step,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _finish_the_step(worker: int) -> None:
    # Ctrl-C reaches all processes of the terminal; the trainer still needs rows to stop in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unwrap(batch: list[Batch]) -> Batch:
    return batch[0]


def _align(trainer: Any, batches: int) -> int:
    """Set the batch counter of a resumed trainer to the start of its optimizer step, and return it.

    Lightning saves how many micro-batches a rank has seen. With another number of ranks or rows a
    step is another number of micro-batches, and a counter off the grid makes it step in the middle
    of a step's rows. 0 if the trainer is not resuming.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarting:
        return 0
    for progress in (loop.batch_progress.current, loop.batch_progress.total):
        moved = batches - progress.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress, name, getattr(progress, name) + moved)
    return batches
