"""Several named keys in a long text, one of which is asked for at its end.

After the "multi-key needle in a haystack" of RULER (arXiv 2404.06654). A passkey is found by what
stands around it; here a query has to tell one statement from others of the same form.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np

from lit_sparse.data.tasks.symbols import Numbers, Words
from lit_sparse.data.tasks.task import Note, Planted, check, spread, write
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class MultiKey:
    """Named keys in the tokens of one tokenizer.

    A statement is "# key of NAME: NUMBER" on a line of its own; the question is the line of one of
    them up to the number. A recall is one of the statements once more.

    Args:
        tokenizer: encodes the texts; not kept.
        keys: statements, the asked one included.
        digits: digits of a number.

    Raises:
        ValueError: a value is out of its range, or the tokenizer has too few words or digits that
            take equally many tokens.
    """

    name: ClassVar[str] = "multikey"
    has_depth: ClassVar[bool] = True

    tokenizer: InitVar[Tokenizer]
    keys: int = 4
    digits: int = 3

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        if self.keys < 2:
            raise ValueError(f"MultiKey keys must be >= 2, got {self.keys}")
        self._numbers = Numbers(tokenizer, self.digits)
        self._names = Words(tokenizer, self.keys)
        self._before, self._between = tokenizer.encode("\n# key of"), tokenizer.encode(": ")
        self._after = tokenizer.encode("\n")
        texts = len(self._before) + len(self._between)
        self.question_tokens = texts + self._names.tokens + self._numbers.tokens
        """Tokens of the question and its answer."""
        self.statement_tokens = self.question_tokens + len(self._after)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry the task, at any depth."""
        # One statement's room is left over: the asked one may stand so that less than a statement
        # is free before it, and after it.
        return (self.keys + 1) * self.statement_tokens + self.question_tokens

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """See `Task`. The depth is that of the asked statement, which no recall precedes."""
        check(self, tokens, depth)
        size = self.statement_tokens
        question = len(tokens) - self.question_tokens
        names, values = self._names.draw(rng, self.keys), self._numbers.draw(rng, self.keys)
        depth = rng.random() if depth is None else depth
        place = round(depth * (question - size))
        fit_before, fit_after = place // size, (question - size - place) // size
        recalls = min(recalls, fit_before + fit_after - (self.keys - 1))
        # The asked key is number 0. The others, and what is said again, stand around it.
        again = rng.integers(self.keys, size=recalls)
        around = rng.permutation(np.concatenate([np.arange(1, self.keys), again]))
        before = int(rng.binomial(len(around), depth))
        before = min(max(before, len(around) - fit_after), fit_before)
        early, late = around[:before], around[before:]
        early[early == 0] = rng.integers(1, self.keys, size=np.sum(early == 0))
        order = [*early, 0, *late]
        notes = [
            self._line(names[key], values[key], told=key in order[:number])
            for number, key in enumerate(order)
        ]
        notes.append(Note.of(self._before, names[0], self._between, values[0], answer=[3]))
        places = [
            *spread(len(early) * [size], 0, place, rng),
            place,
            *spread(len(late) * [size], place + size, question, rng),
            question,
        ]
        return write(tokens, notes, places, place / (question - size))

    def _line(self, name: np.ndarray, value: np.ndarray, told: bool) -> Note:
        parts = (self._before, name, self._between, value, self._after)
        return Note.of(*parts, answer=[3] if told else [])
