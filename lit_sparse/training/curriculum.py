"""The context-length curriculum: which document length, RoPE rule and attention a step trains
with.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from lit_sparse.budget import Budget


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What a stage, or a run of doubling ones, may set besides length and steps.

    Each holds for the stage that says it and falls back to the run's own value where a later stage
    does not; only RoPE stays, since a model that learnt new frequencies cannot go back.

    Args:
        rope: RoPE of the stage. Either explicit parameters in the names of transformers, for
            example `{"rope_theta": 50000.0}`, where what is left out keeps the value that it had.
            Or a rule, for example `{"rule": "yarn"}`, which computes them from the stage's length
            and the RoPE that the model was loaded with; see `lit_sparse.models.rule_parameters`.
            None: that of the stage before.
        attention: "sparse" by the budget, or "dense" (a first dense stage serves as warm-up).
        budget: law of the stage for the layers that have none of their own. None: that of
            `SparseAttention`, whatever the stage before had.
        learning_rate: peak of the schedule while the stage lasts; warm-up and cosine go on over
            the whole run, as shares of it. None: the learning rate of the run.
        mixture: weights of the data's stores by name, >= 0 and not all 0. None: those of the data.
    """

    rope: dict[str, Any] | None = None
    attention: Literal["sparse", "dense"] = "sparse"
    budget: Budget | None = None
    learning_rate: float | None = None
    mixture: dict[str, float] | None = None


@dataclass(frozen=True)
class Stage(StageOptions):
    """A run of optimizer steps with one context length; options are those of `StageOptions`.

    Args:
        length: longest piece of a document in a row, in tokens.
        steps: optimizer steps of the stage.
    """

    length: int
    steps: int


class Curriculum:
    """Stages in order. A pure function of the optimizer step, so that a resumed run finds its
    place.

    Args:
        stages: at least one; lengths must not fall.

    Raises:
        ValueError: a stage is out of range; the message names its key.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("curriculum.stages is empty: give at least one {length, steps}")
        for i, stage in enumerate(stages):
            where = f"curriculum.stages[{i}]"
            if stage.length < 1:
                raise ValueError(f"{where}.length must be >= 1 token, got {stage.length}")
            if stage.steps < 1:
                raise ValueError(f"{where}.steps must be >= 1, got {stage.steps}")
            if stage.attention not in ("sparse", "dense"):
                raise ValueError(
                    f"{where}.attention must be sparse or dense, got {stage.attention!r}"
                )
            if i and stage.length < stages[i - 1].length:
                raise ValueError(
                    f"{where}.length = {stage.length} is shorter than the stage before it "
                    f"({stages[i - 1].length}); lengths of a curriculum must not fall"
                )
        self.stages = tuple(stages)
        self.ends = tuple(accumulate(stage.steps for stage in stages))
        """First optimizer step after each stage."""

    @classmethod
    def doubling(cls, first: int, last: int, steps: int, **others: Any) -> Curriculum:
        """Stages of lengths first, 2 * first, ... last, of `steps` optimizer steps each."""
        if first < 1 or last < first:
            raise ValueError(f"doubling needs 1 <= first <= last, got {first} and {last}")
        lengths = [first]
        while lengths[-1] * 2 <= last:
            lengths.append(lengths[-1] * 2)
        if lengths[-1] != last:
            raise ValueError(
                f"{last} is not {first} doubled: the last stage would be {lengths[-1]}"
            )
        return cls([Stage(length=length, steps=steps, **others) for length in lengths])

    @property
    def total_steps(self) -> int:
        return self.ends[-1]

    @property
    def longest(self) -> int:
        return self.stages[-1].length

    def index_at(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (from 0) trains in; past the end, the
        last.
        """
        return min(bisect_right(self.ends, step), len(self.stages) - 1)

    def at(self, step: int) -> Stage:
        return self.stages[self.index_at(step)]

    def check(self, *, row_tokens: int, block: int | None = None) -> None:
        """Raise ValueError where a stage does not fit the rows or the blocks of the attention."""
        for i, stage in enumerate(self.stages):
            where = f"curriculum.stages[{i}].length"
            if stage.length > row_tokens:
                raise ValueError(
                    f"{where} = {stage.length} exceeds data.row_tokens = {row_tokens}: a row "
                    f"holds whole pieces, so set it to the longest stage ({self.longest})"
                )
            if block is not None and stage.length % block:
                below = stage.length // block * block
                raise ValueError(
                    f"{where} = {stage.length} is not a multiple of the attention block "
                    f"({block} keys); the nearest that are: {below or block} and {below + block}"
                )
