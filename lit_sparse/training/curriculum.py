"""The context-length curriculum: which document length, RoPE rule and attention a step trains
with.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal

from lit_sparse.budget import Budget
from lit_sparse.models import check_rule


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


@dataclass(frozen=True)
class Doubling(StageOptions):
    """Stages of lengths first, 2 * first, ... last; options are those of `StageOptions`, for all.

    Args:
        first: length of the first stage, in tokens.
        last: length of the last one: `first` doubled some times.
        steps: optimizer steps of every stage, or a list with those of each.
    """

    first: int
    last: int
    steps: int | list[int]

    def stages(self) -> list[Stage]:
        """ValueError if doubling does not lead to `last`, or `steps` are of another number."""
        if not 1 <= self.first <= self.last:
            raise ValueError(
                f"curriculum.doubling needs 1 <= first <= last, got {self.first} and {self.last}"
            )
        lengths = [self.first]
        while lengths[-1] * 2 <= self.last:
            lengths.append(lengths[-1] * 2)
        if lengths[-1] != self.last:
            raise ValueError(
                f"curriculum.doubling.last: {self.last} is not {self.first} doubled; the nearest "
                f"that are: {lengths[-1]} and {lengths[-1] * 2}"
            )
        steps = self.steps if isinstance(self.steps, list) else [self.steps] * len(lengths)
        if len(steps) != len(lengths):
            raise ValueError(
                f"curriculum.doubling.steps has {len(steps)} numbers for the {len(lengths)} stages "
                f"of lengths {', '.join(map(str, lengths))}"
            )
        options = {field.name: getattr(self, field.name) for field in fields(StageOptions)}
        return [Stage(length, n, **options) for length, n in zip(lengths, steps, strict=True)]


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
            _check(stage, f"curriculum.stages[{i}]")
            if i and stage.length < stages[i - 1].length:
                raise ValueError(
                    f"curriculum.stages[{i}].length = {stage.length} is shorter than the stage "
                    f"before it ({stages[i - 1].length}); lengths of a curriculum must not fall"
                )
        self.stages = tuple(stages)
        self.ends = tuple(accumulate(stage.steps for stage in stages))
        """First optimizer step after each stage."""

    @classmethod
    def doubling(cls, first: int, last: int, steps: int | list[int], **options: Any) -> Curriculum:
        """The curriculum of a `Doubling`."""
        return cls(Doubling(first=first, last=last, steps=steps, **options).stages())

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

    def learning_rate(self, step: int, default: float) -> float:
        """Peak of the schedule in the stage of optimizer step `step`; `default` if it has none."""
        peak = self.at(step).learning_rate
        return default if peak is None else peak

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


def _check(stage: Stage, where: str) -> None:
    def require(holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{where}.{key} must be {rule}, got {getattr(stage, key)!r}")

    require(stage.length >= 1, "length", ">= 1 token")
    require(stage.steps >= 1, "steps", ">= 1")
    require(stage.attention in ("sparse", "dense"), "attention", "sparse or dense")
    require(stage.budget is None or isinstance(stage.budget, Budget), "budget", "a Budget")
    rate = stage.learning_rate
    require(rate is None or 0 < rate < math.inf, "learning_rate", "positive")
    if stage.mixture is not None:
        weights = list(stage.mixture.values())
        weighs = all(0 <= weight < math.inf for weight in weights) and any(weights)
        require(weighs, "mixture", "weights >= 0 that are not all 0")
    require(stage.rope is None or bool(stage.rope), "rope", "parameters, a rule or null")
    if stage.rope and "rule" in stage.rope:
        try:
            check_rule(stage.rope)
        except ValueError as error:
            raise ValueError(f"{where}.rope: {error}") from error


def find_curriculum(trainer: Any) -> Curriculum | None:
    """The curriculum of a Lightning trainer: of its `ContextCurriculum`, else of its data."""
    for holder in (*trainer.callbacks, getattr(trainer, "datamodule", None)):
        found = getattr(holder, "curriculum", None)
        if isinstance(found, Curriculum):
            return found
    return None
