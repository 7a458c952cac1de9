"""One name with several values in a long text, all of which are asked for at its end.

After the "multi-value needle in a haystack" of RULER (arXiv 2404.06654); here the answer is in the
order of the statements.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np

from lit_sparse.data.tasks.symbols import Numbers, Words
from lit_sparse.data.tasks.task import Note, Planted, check, spread, write
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class MultiValue:
    """A name and its values in the tokens of one tokenizer.

    A statement is "# value of NAME: NUMBER" on a line of its own; the question is "# all values of
    NAME: ", and the answer are the numbers, with commas between. A recall is a line that asks for
    all values so far and tells them; it stands before the last statement.

    Args:
        tokenizer: encodes the texts; not kept.
        values: statements.
        digits: digits of a number.

    Raises:
        ValueError: a value is out of its range, or the digits take differing numbers of tokens.
    """

    name: ClassVar[str] = "multivalue"
    has_depth: ClassVar[bool] = False

    tokenizer: InitVar[Tokenizer]
    values: int = 3
    digits: int = 3

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        if self.values < 2:
            raise ValueError(f"MultiValue values must be >= 2, got {self.values}")
        self._numbers = Numbers(tokenizer, self.digits)
        self._names = Words(tokenizer, 1)
        self._statement = tokenizer.encode("\n# value of")
        self._question = tokenizer.encode("\n# all values of")
        self._between, self._comma = tokenizer.encode(": "), tokenizer.encode(", ")
        self._after = tokenizer.encode("\n")

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry the task."""
        name, numbers = self._names.tokens, self.values * self._numbers.tokens
        statement = len(self._statement) + name + len(self._between) + len(self._after)
        commas = (self.values - 1) * len(self._comma)
        question = len(self._question) + name + len(self._between) + commas
        return self.values * statement + question + 2 * numbers

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """See `Task`."""
        check(self, tokens, depth)
        (name,) = self._names.draw(rng, 1)
        values = self._numbers.draw(rng, self.values)
        notes = [
            Note.of(self._statement, name, self._between, value, self._after) for value in values
        ]
        asked = self._list(name, values)
        room = len(tokens) - len(asked) - sum(map(len, notes))
        # From the last statement backwards, so that places in the list of notes stay true.
        for known in np.sort(rng.integers(1, self.values, size=recalls))[::-1]:
            recall = self._list(name, values[:known], self._after)
            if len(recall) <= room:
                notes.insert(int(known), recall)
                room -= len(recall)
        question = len(tokens) - len(asked)
        places = spread([len(note) for note in notes], 0, question, rng)
        return write(tokens, [*notes, asked], [*places, question])

    def _list(self, name: np.ndarray, values: np.ndarray, *after: np.ndarray) -> Note:
        """The question for values, and the answer."""
        listed = [part for value in values for part in (self._comma, value)][1:]
        numbers = range(3, 3 + len(listed), 2)
        return Note.of(self._question, name, self._between, *listed, *after, answer=numbers)
