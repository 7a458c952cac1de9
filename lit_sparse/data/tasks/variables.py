"""Variables that are assigned to each other: the value of the last one is several hops away.

After the "variable tracking" of RULER (arXiv 2404.06654): one look back does not answer it.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

import numpy as np

from lit_sparse.data.tasks.symbols import Numbers, Words
from lit_sparse.data.tasks.task import Note, Planted, check, spread, write
from lit_sparse.data.tokenizer import Tokenizer


@dataclass
class Variables:
    """Chains of assignments in the tokens of one tokenizer.

    A chain is "# FIRST = NUMBER", "# SECOND = FIRST" and so on, each on a line of its own, in order
    at random places; several chains are mixed. The question is "# value of LAST: " for the last
    variable of one of them. A recall is such a question with its answer, for another variable that
    was assigned before.

    Args:
        tokenizer: encodes the texts; not kept.
        hops: assignments of a chain after its first one.
        chains: the asked one and those that distract from it.
        digits: digits of a number.

    Raises:
        ValueError: a value is out of its range, or the tokenizer has too few words or digits that
            take equally many tokens.
    """

    name: ClassVar[str] = "variables"
    has_depth: ClassVar[bool] = False

    tokenizer: InitVar[Tokenizer]
    hops: int = 1
    chains: int = 3
    digits: int = 3

    def __post_init__(self, tokenizer: Tokenizer) -> None:
        if self.hops < 1:
            raise ValueError(f"Variables hops must be >= 1, got {self.hops}")
        if self.chains < 1:
            raise ValueError(f"Variables chains must be >= 1, got {self.chains}")
        self._numbers = Numbers(tokenizer, self.digits)
        self._names = Words(tokenizer, self.chains * (self.hops + 1))
        self._before, self._after = tokenizer.encode("\n#"), tokenizer.encode("\n")
        # Words bring the space before them along, numbers do not.
        self._equals, self._equals_number = tokenizer.encode(" ="), tokenizer.encode(" = ")
        self._question, self._between = tokenizer.encode("\n# value of"), tokenizer.encode(": ")

    @property
    def shortest(self) -> int:
        """Tokens of the shortest piece that can carry the task."""
        name, line = self._names.tokens, len(self._before) + len(self._after)
        first = line + name + len(self._equals_number) + self._numbers.tokens
        other = line + 2 * name + len(self._equals)
        question = len(self._question) + name + len(self._between) + self._numbers.tokens
        return self.chains * (first + self.hops * other) + question

    def plant(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        depth: float | None = None,
        recalls: int = 0,
    ) -> Planted:
        """See `Task`."""
        check(self, tokens, depth)
        length = self.hops + 1
        values = self._numbers.draw(rng, self.chains)
        names = self._names.draw(rng, self.chains * length).reshape(self.chains, length, -1)
        # The asked chain is number 0. The i-th time that a chain comes is its i-th assignment.
        order = rng.permutation(np.repeat(np.arange(self.chains), length))
        assigned: list[tuple[int, int]] = []
        for chain in order:
            assigned.append((int(chain), sum(chain == other for other, _ in assigned)))
        notes = [self._assignment(names[c], i, values[c]) for c, i in assigned]
        asked = self._asked(names[0, -1], values[0])
        question = len(tokens) - len(asked)
        recall_size = len(asked) + len(self._after)
        recalls = min(recalls, (question - sum(map(len, notes))) // recall_size)
        # From the end backwards, so that places in the list of notes stay true.
        for known in np.sort(rng.integers(1, len(assigned) + 1, size=recalls))[::-1]:
            others = [(c, i) for c, i in assigned[:known] if (c, i) != (0, self.hops)]
            chain, i = others[rng.integers(len(others))]
            notes.insert(int(known), self._asked(names[chain, i], values[chain], self._after))
        places = spread([len(note) for note in notes], 0, question, rng)
        return write(tokens, [*notes, asked], [*places, question])

    def _assignment(self, names: np.ndarray, i: int, value: np.ndarray) -> Note:
        """The i-th line of a chain."""
        told = (self._equals, names[i - 1]) if i else (self._equals_number, value)
        return Note.of(self._before, names[i], *told, self._after)

    def _asked(self, name: np.ndarray, value: np.ndarray, *after: np.ndarray) -> Note:
        """The question for a variable, and the answer."""
        return Note.of(self._question, name, self._between, value, *after, answer=[3])
