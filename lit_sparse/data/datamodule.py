"""The LightningDataModule: a corpus as packed rows, in the order that the row index decided."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from lit_sparse.data.corpus import Skipped, read_corpus
from lit_sparse.data.loading import (
    Batch,
    RowLoader,
    TrainingRows,
    TrainingSampler,
    ValidationRows,
    ValidationSampler,
)
from lit_sparse.data.retrieval import Passkey
from lit_sparse.data.rows import RowIndex
from lit_sparse.data.store import TokenStore, bytes_per_token, unigram_bits
from lit_sparse.data.tokenizer import Tokenizer, load_tokenizer
from lit_sparse.training.curriculum import Curriculum


class PackedTextDataModule(LightningDataModule):
    """Text packed into rows of equal size, cut to the context length of the curriculum's stage.

    A batch is one row: `input_ids`, `position_ids` and `labels` (already shifted, -100 where there
    is nothing to predict), int64 [1, row_tokens], and `step_tokens`, an int64 scalar: the loss
    tokens of the whole optimizer step over all ranks and accumulations (in validation those of the
    row).

    One epoch of the trainer is the whole run of the curriculum. `setup` sets the trainer's
    `accumulate_grad_batches` to the rows of a step that fall to one rank, and `max_steps`, where it
    was left open, to the end of the curriculum. Ranks are those of
    `trainer.distributed_sampler_kwargs`, so a strategy whose ranks share samples (sequence
    parallelism) says so there.

    Args:
        path: "stdlib" (Python's own source), a folder, or a file of text or JSON lines.
        tokenizer: "bytes", or a local Hugging Face directory.
        row_tokens: tokens of a row, at least the curriculum's longest stage.
        rows_per_step: rows of an optimizer step over all ranks, a multiple of their number.
        validation_fraction: share of the documents that is kept for validation, in (0, 1).
        validation_rows: rows of a validation pass, at most (fewer if the documents hold less).
        passkey_fraction: share of the training pieces that a passkey is planted in, in [0, 1].
        passkey_recalls: repetitions of the passkey inside such a piece.
        text_field: key of the text in a line of a `.jsonl` file.
        seed: of the split, the order and the passkeys.
        num_workers: processes that assemble rows; 0 is the training process itself.
        curriculum: the stages of the run.
        block: keys of an attention block, to check stage lengths against; None checks nothing.

    Raises:
        ValueError: a value is out of its range; the message names its key.
    """

    def __init__(
        self,
        path: str = "stdlib",
        tokenizer: str = "bytes",
        row_tokens: int = 4096,
        rows_per_step: int = 1,
        validation_fraction: float = 0.05,
        validation_rows: int = 8,
        passkey_fraction: float = 0.0,
        passkey_recalls: int = 0,
        text_field: str = "text",
        seed: int = 0,
        num_workers: int = 0,
        curriculum: Curriculum | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()

        def require(holds: bool, key: str, rule: str, value: object) -> None:
            if not holds:
                raise ValueError(f"data.{key} must be {rule}, got {value!r}")

        require(row_tokens >= 1, "row_tokens", ">= 1", row_tokens)
        require(rows_per_step >= 1, "rows_per_step", ">= 1", rows_per_step)
        require(
            0 < validation_fraction < 1, "validation_fraction", "in (0, 1)", validation_fraction
        )
        require(validation_rows >= 1, "validation_rows", ">= 1", validation_rows)
        require(0 <= passkey_fraction <= 1, "passkey_fraction", "in [0, 1]", passkey_fraction)
        require(passkey_recalls >= 0, "passkey_recalls", ">= 0", passkey_recalls)
        require(seed >= 0, "seed", ">= 0", seed)
        require(num_workers >= 0, "num_workers", ">= 0", num_workers)
        self.path, self.tokenizer, self.text_field = path, tokenizer, text_field
        self.row_tokens, self.rows_per_step = row_tokens, rows_per_step
        self.validation_fraction, self.validation_rows = validation_fraction, validation_rows
        self.passkey_fraction, self.passkey_recalls = passkey_fraction, passkey_recalls
        self.seed, self.num_workers = seed, num_workers
        self.curriculum, self.block = curriculum, block
        self.start_step = 0
        """Optimizer step that training batches start at where no trainer is attached."""
        self.validation_length = curriculum.longest if curriculum is not None else row_tokens
        """Longest piece of the validation rows, in tokens. A change holds from the next pass on."""
        self._text_tokenizer: Tokenizer | None = None
        self._passkey: Passkey | None = None
        self._stores: tuple[TokenStore, TokenStore] | None = None
        self._skipped = Skipped()
        self._rows: RowIndex | None = None
        self._unigram_bits: float | None = None
        self._bytes_per_token: float | None = None

    # -- what there is --

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer object, loaded when first asked for: it needs no `setup`."""
        if self._text_tokenizer is None:
            self._text_tokenizer = load_tokenizer(self.tokenizer)
        return self._text_tokenizer

    @property
    def vocab_size(self) -> int:
        return self.text_tokenizer.vocab_size

    @property
    def passkey(self) -> Passkey:
        """The retrieval task in the tokens of this tokenizer."""
        if self._passkey is None:
            self._passkey = Passkey(self.text_tokenizer, recalls=self.passkey_recalls)
        return self._passkey

    @property
    def train_store(self) -> TokenStore:
        return self._read()[0]

    @property
    def validation_store(self) -> TokenStore:
        return self._read()[1]

    @property
    def rows(self) -> RowIndex:
        """All rows of the run. Built by `setup`."""
        if self._rows is None:
            raise RuntimeError("PackedTextDataModule.setup() has not run")
        return self._rows

    @property
    def unigram_bits(self) -> float:
        """Bits per validation token of a model without context; see `unigram_bits`."""
        if self._unigram_bits is None:
            self._unigram_bits = unigram_bits(self.train_store, self.validation_store)
        return self._unigram_bits

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text / its tokens (document ends not counted); 1.0 for
        bytes.
        """
        if self._bytes_per_token is None:
            self._bytes_per_token = bytes_per_token(self.validation_store, self.text_tokenizer)
        return self._bytes_per_token

    @property
    def unigram_bits_per_byte(self) -> float:
        return self.unigram_bits / self.bytes_per_token

    def describe(self) -> str:
        """What was read, and how much of each stage is as long as the stage asks for."""
        train, validation = self.train_store, self.validation_store
        lines = [
            f"{self.path}: {len(train)} documents of {len(train.tokens):,} tokens for training, "
            f"{len(validation)} of {len(validation.tokens):,} for validation, {self._skipped}"
        ]
        if self._rows is not None and self.curriculum is not None:
            epochs = len(self._rows) * self.row_tokens / len(train.tokens)
            lines.append(
                f"{len(self._rows):,} rows of {self.row_tokens:,} tokens, {epochs:.2f} epochs"
            )
            first = 0
            for stage, end in zip(self.curriculum.stages, self.curriculum.ends, strict=True):
                rows = slice(first * self.rows_per_step, end * self.rows_per_step)
                share = self._rows.full_share(stage.length, rows)
                lines.append(
                    f"steps {first} to {end - 1}: {share:.0%} of the tokens are in pieces of the "
                    f"full {stage.length:,}"
                )
                first = end
        return "\n".join(lines)

    # -- Lightning --

    def setup(self, stage: str | None = None) -> None:
        """Read the corpus and decide all rows (once), and fit the trainer's accumulation to them.

        Raises:
            ValueError: the corpus, the curriculum, the rows and the ranks do not go together; the
                message names the key to change.
        """
        curriculum = self._curriculum()
        _, world = self._place()
        self._check_world(world)
        if self._rows is None:
            curriculum.check(row_tokens=self.row_tokens, block=self.block)
            if self.passkey_fraction and self.passkey.shortest > curriculum.longest:
                raise ValueError(
                    f"data.passkey_fraction = {self.passkey_fraction}, but a passkey needs pieces "
                    f"of {self.passkey.shortest} tokens and the longest stage has "
                    f"{curriculum.longest}"
                )
            self._rows = RowIndex.build(
                self.train_store.lengths,
                curriculum,
                self.row_tokens,
                self.rows_per_step,
                self.seed,
            )
        if len(self._validation_rows()) < world:
            raise ValueError(
                f"data.validation_rows = {self.validation_rows} and the validation documents make "
                f"{len(self._validation_rows())} row(s) of {self.row_tokens} tokens, fewer than "
                f"the {world} ranks; raise data.validation_fraction, data.validation_rows or both"
            )
        if self.trainer is not None and stage in (None, "fit"):
            self._adjust(self.trainer, curriculum, self.rows_per_step // world)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Rows from the trainer's global step (without one, `start_step`) to the run's end."""
        rank, world = self._place()
        self._check_world(world)
        start, counted = self.start_step, 0
        if self.trainer is not None:
            start = self.trainer.global_step
            counted = _align(self.trainer, start * self.rows_per_step // world)
        passkey = self.passkey if self.passkey_fraction else None
        return self._loader(
            TrainingRows(self.train_store, self.rows, passkey, self.passkey_fraction, self.seed),
            TrainingSampler(len(self.rows), self.rows_per_step, rank, world, start, counted),
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

    def _read(self) -> tuple[TokenStore, TokenStore]:
        if self._stores is None:
            corpus = read_corpus(self.path, self.text_field)
            store = TokenStore.build(corpus, self.text_tokenizer)
            self._skipped = corpus.skipped
            self._stores = store.split(self.validation_fraction, self.seed)
        return self._stores

    def _curriculum(self) -> Curriculum:
        if self.curriculum is None:
            raise ValueError(
                "data.curriculum is not set: it decides how long the pieces of a row are"
            )
        return self.curriculum

    def _validation_rows(self) -> ValidationRows:
        return ValidationRows(
            self.validation_store, self.row_tokens, self.validation_rows, self.seed
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
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if world > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ValueError(
                "trainer.use_distributed_sampler must be false: the rows are divided among the "
                "ranks already, and a second division would train on some of them only"
            )

    def _adjust(self, trainer: Any, curriculum: Curriculum, accumulate: int) -> None:
        trainer.accumulate_grad_batches = accumulate
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
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


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
