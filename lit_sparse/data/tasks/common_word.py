"""The common word: a long list of words, and the question which of them it holds most often.

A passkey stands in one place, which a top-k selection finds; here every word of the list counts a
little, and a selection that drops most of them drops the answer's evidence. After the "common words
extraction" of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np

from lit_sparse.data.tasks.symbols import Words
from lit_sparse.data.tasks.task import Note, Planted, check, spread, write
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class CommonWord:
    """The task in the tokens of one tokenizer.

    A list is `prefix`, words and `question`; the answer is the word that the list holds most often.
    It takes the whole piece, but for less than a word's tokens of text before it. A recall is a
    list of its own before the last one, with its question and answer.

    Args:
        tokenizer: encodes the texts; not kept.
        prefix, question: text before and after the list.
        words: distinct words of a list.
        share: share of the list that is the answer; the others are equally frequent, to one.

    Raises:
        ValueError: a value out of its range, or a tokenizer to which too few words are alike.
    """

    name: ClassVar[str] = "aggregation"
    has_depth: ClassVar[bool] = False

    tokenizer: InitVar[Tokenizer]
    prefix: str = "\n# words:"
    question: str = "\n# most common word:"
    words: int = 16
    share: float = 0.25

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        if self.words < 2:
            raise ValueError(f"CommonWord words must be >= 2, got {self.words}")
        least = 2 / (self.words + 1)
        if not least <= self.share < 1:
            raise ValueError(
                f"CommonWord share must be at least 2 / (words + 1) = {least:.4g}, twice that of "
                f"any other word, and below 1, got {self.share}"
            )
        self._words = Words(tokenizer, self.words)
        self._prefix = tokenizer.encode(self.prefix)
        self._question = tokenizer.encode(self.question)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest list: the answer stands at least twice as often as any other."""
        count = self.words
        while self._counts(count)[0] < 2 * self._counts(count)[1]:
            count += 1
        return self._length(count)

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """See `Task`."""
        check(self, tokens, depth)
        n, size = len(tokens), self.shortest
        lists = min(recalls + 1, n // size)
        # Each list reaches from the end of the one before it to its own end.
        ends = [place + size for place in spread((lists - 1) * [size], 0, n - size, rng)] + [n]
        notes = [self._list(end - start, rng) for start, end in zip([0, *ends], ends, strict=False)]
        places = [end - len(note) for end, note in zip(ends, notes, strict=True)]
        return write(tokens, notes, places)

    def _list(self, room: int, rng: np.random.Generator) -> Note:
        """A list of at most so many tokens, the question and the answer."""
        copies = self._counts((room - self._length(0)) // self._words.tokens)
        chosen = self._words.draw(rng, self.words)
        listed = rng.permutation(np.repeat(chosen, copies, axis=0)).ravel()
        return Note.of(self._prefix, listed, self._question, chosen[0], answer=[3])

    def _length(self, slots: int) -> int:
        """Tokens of a list of so many words, its question and answer included."""
        return len(self._prefix) + len(self._question) + (slots + 1) * self._words.tokens

    def _counts(self, slots: int) -> list[int]:
        """How often each word stands in a list, the answer first."""
        answer = round(self.share * slots)
        each, more = divmod(slots - answer, self.words - 1)
        return [answer, *(each + (i < more) for i in range(self.words - 1))]
