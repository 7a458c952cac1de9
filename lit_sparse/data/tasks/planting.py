"""Which training pieces carry which task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lit_sparse.data.tasks import TASKS, Task, make_task
from lit_sparse.data.tokenizer import Tokenizer


class Planting:
    """Tasks with the shares of the pieces that carry them.

    Args:
        shares: as `check_shares` asks.
        tokenizer: of the pieces.
        recalls: see `Task.plant`.

    Raises:
        ValueError: the tokenizer does not allow a task; the message names `data.tasks`.
    """

    def __init__(self, shares: Mapping[str, float], tokenizer: Tokenizer, recalls: int = 0) -> None:
        wanted = {name: share for name, share in shares.items() if share > 0}
        self.tasks: list[Task] = []
        for name in wanted:
            try:
                self.tasks.append(make_task(name, tokenizer))
            except ValueError as error:
                raise ValueError(f"data.tasks.{name}: {error}") from error
        self.recalls = recalls
        self._until = np.cumsum([*wanted.values()])

    def check(self, longest: int) -> None:
        """Raise ValueError, naming `data.tasks`, for a task that no piece of a run whose longest
        stage is this can carry.
        """
        for task in self.tasks:
            if task.shortest > longest:
                raise ValueError(
                    f"data.tasks.{task.name} needs pieces of {task.shortest} tokens, and the "
                    f"longest stage has {longest}; leave it out, or lengthen curriculum.stages"
                )

    def plant(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A piece with the task in it that `rng` draws by the shares; as it is where that is none,
        or one that the piece is too short for.
        """
        drawn = int(np.searchsorted(self._until, rng.random(), side="right"))
        if drawn == len(self.tasks) or len(tokens) < self.tasks[drawn].shortest:
            return tokens
        return self.tasks[drawn].plant(tokens, rng, recalls=self.recalls).ids


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise ValueError, naming `data.tasks`, unless these are shares of known tasks in [0, 1],
    together at most 1.
    """
    for name, share in shares.items():
        if name not in TASKS:
            raise ValueError(f"data.tasks: there is no task {name!r}, only {', '.join(TASKS)}")
        if not 0 <= share <= 1:
            raise ValueError(f"data.tasks.{name} must be in [0, 1], got {share!r}")
    if sum(shares.values()) > 1 + 1e-9:
        raise ValueError(
            f"data.tasks: the shares add up to {sum(shares.values()):.6g}; they are of all pieces, "
            "so at most 1"
        )
