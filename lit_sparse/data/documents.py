"""Some documents of a store, numbered from 0, without a copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lit_sparse.data.stores.store import TokenStore


@dataclass(frozen=True)
class Documents:
    """A view of a store.

    Args:
        store: where they are.
        numbers: int64 [documents], their numbers in the store.
    """

    store: TokenStore
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end included: int64 [documents]."""
        return self.store.lengths[self.numbers]

    @property
    def text_lengths(self) -> np.ndarray:
        """The same without their ends, which are no text: int64 [documents]."""
        return self.lengths - 1

    def read(self, index: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of one document, a view."""
        return self.store.read(int(self.numbers[index]), start, length)

    def name(self, index: int) -> str:
        """Name of one document; see `TokenStore.name`."""
        return self.store.name(int(self.numbers[index]))
