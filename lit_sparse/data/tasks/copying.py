"""A random run of characters, and the same once more: what looks back can write the second one.

The plainest of the tasks, and the first that a model learns (induction heads, Olsson et al., arXiv
2209.11895); the others need it.
"""

from __future__ import annotations

import string
from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np

from lit_sparse.data.tasks.task import Planted, check
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class Copy:
    """Random characters, repeated to the end of the piece.

    They are letters, digits and punctuation that are one token each. Without recalls they fill half
    of the piece; with recalls it holds them up to so many times more, how often is drawn.

    Args:
        tokenizer: encodes the characters; not kept.

    Raises:
        ValueError: to the tokenizer too few characters are one token.
    """

    name: ClassVar[str] = "copy"
    has_depth: ClassVar[bool] = False

    tokenizer: InitVar[Tokenizer]

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        characters = string.ascii_letters + string.digits + string.punctuation
        encoded = [tokenizer.encode(character) for character in characters]
        self._ids = np.unique([ids[0] for ids in encoded if len(ids) == 1]).astype(np.int64)
        if len(self._ids) < 8:
            raise ValueError(
                f"the task copy needs at least 8 characters that are one token each, and this "
                f"tokenizer has {len(self._ids)}"
            )

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry the task."""
        return 16

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """See `Task`; the whole piece is overwritten."""
        check(self, tokens, depth)
        n = len(tokens)
        period = max(-(-n // (2 + int(rng.integers(recalls + 1)))), self.shortest // 4)
        run = rng.choice(self._ids, period)
        return Planted(np.resize(run, n), np.arange(n) >= period, None)
