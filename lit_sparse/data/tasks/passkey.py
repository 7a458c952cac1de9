"""The planted passkey: a number stated somewhere in a long text and asked for at its end.

Source of the task: Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300). Here
it also goes into training documents, so that there is something to learn that only far attention
can answer.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np

from lit_sparse.data.tasks.symbols import Numbers
from lit_sparse.data.tasks.task import Note, Planted, check, spread, write
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class Passkey:
    """A passkey in the tokens of one tokenizer.

    A statement is `prefix`, the key and `suffix`; the question is `prefix` once more, and the
    answer follows it. A recall is the statement once more.

    Args:
        tokenizer: encodes the texts; not kept.
        prefix: text before the key, in the statement and in the question.
        digits: digits of a key.
        suffix: text after the key of a statement.
        separator: text before each digit; see `Numbers`.

    Raises:
        ValueError: the digits take differing numbers of tokens.
    """

    name: ClassVar[str] = "passkey"
    has_depth: ClassVar[bool] = True

    tokenizer: InitVar[Tokenizer]
    prefix: str = "\n# passkey: "
    digits: int = 5
    suffix: str = "\n"
    separator: str | None = None

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        self._numbers = Numbers(tokenizer, self.digits, self.separator)
        self.separator = self._numbers.separator
        self._prefix = tokenizer.encode(self.prefix)
        self._suffix = tokenizer.encode(self.suffix)
        self.question_tokens = len(self._prefix) + self._numbers.tokens
        """Tokens of the question and its answer."""
        self.statement_tokens = self.question_tokens + len(self._suffix)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry the task."""
        n = self.statement_tokens + self.question_tokens
        while 3 * n // 4 < self.statement_tokens:
            n += 1
        return n

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """See `Task`. Without a depth the statement stands inside the first three quarters; recalls
        stand at random places between it and the question.
        """
        check(self, tokens, depth)
        n, size = len(tokens), self.statement_tokens
        question = n - self.question_tokens
        (key,) = self._numbers.draw(rng, 1)
        if depth is None:
            place = int(rng.integers(min(3 * n // 4, question) - size + 1))
        else:
            place = round(depth * (question - size))
        after = place + size
        recalls = min(recalls, (question - after) // size)
        notes = [
            Note.of(self._prefix, key, self._suffix),
            *recalls * [Note.of(self._prefix, key, self._suffix, answer=[1])],
            Note.of(self._prefix, key, answer=[1]),
        ]
        places = [place, *spread(recalls * [size], after, question, rng), question]
        return write(tokens, notes, places, place / max(question - size, 1))
