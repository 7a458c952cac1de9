"""What a run will read: the stores that are there, and how often it goes through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_sparse.data import PackedTextDataModule
from lit_sparse.data.corpora import is_store, open_stores, paths_of, stage_weights
from lit_sparse.data.stores.store import TokenStore
from lit_sparse.data.tokenizer import Tokenizer, has_tokenizer
from lit_sparse.recipes.estimate.settings import Settings


@dataclass(frozen=True)
class Source:
    """A part of `data.path`.

    Args:
        path: as the config writes it.
        share: of the run's tokens.
        tokens: that the run takes from it.
        there: whether something is at the path.
        store: None where it is not packed yet.
    """

    path: str
    share: float
    tokens: float
    there: bool
    store: TokenStore | None

    @property
    def passes(self) -> float | None:
        """How often the run goes through it; None where that is not known yet."""
        return self.tokens / self.store.tokens if self.store is not None else None


@dataclass(frozen=True)
class Data:
    """All that a run reads.

    Args:
        tokenizer: None where it comes with data that is not there yet.
    """

    sources: Sequence[Source]
    tokenizer: Tokenizer | None


def read_data(datamodule: PackedTextDataModule, settings: Settings) -> Data:
    """Look at what `data.path` and `data.tokenizer` name. Packs nothing.

    Raises:
        ValueError: a store is damaged, or does not go with the others or the tokenizer; or a task
            of `data.tasks` does not go with the tokenizer or the stages.
    """
    paths = paths_of(datamodule.path)
    there = [path == "stdlib" or Path(path).exists() for path in paths]
    tokenizer = None
    if datamodule.tokenizer is not None or all(there) or _model_decides(datamodule):
        tokenizer = datamodule.text_tokenizer
    stores: dict[str, TokenStore] = {}
    if tokenizer is not None:
        packed = {path: 1.0 for path in paths if is_store(path)}
        stores = open_stores(packed, tokenizer)
        datamodule.planting.check(settings.curriculum.longest)
    weights = stage_weights(datamodule.path, settings.curriculum)
    row = settings.rows_per_step * settings.row_tokens
    tokens = [stage.steps * row for stage in settings.curriculum.stages] @ weights
    sources = [
        Source(path, share, wanted, found, stores.get(path))
        for path, share, wanted, found in zip(
            paths, tokens / tokens.sum(), tokens, there, strict=True
        )
    ]
    return Data(sources, tokenizer)


def _model_decides(datamodule: PackedTextDataModule) -> bool:
    """Whether the tokenizer is that of the pretrained model, whatever the data will be."""
    return datamodule.pretrained is not None and has_tokenizer(datamodule.pretrained)
