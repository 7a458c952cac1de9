"""The memory of a config under every sharding, and the smallest one that fits a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from lit_sparse.recipes.estimate.compute import Work, work
from lit_sparse.recipes.estimate.gpus import Gpu
from lit_sparse.recipes.estimate.memory import (
    Memory,
    Row,
    cache_bytes,
    prefill_memory,
    row_memory,
)
from lit_sparse.recipes.estimate.settings import Settings
from lit_sparse.recipes.estimate.sharding import Sharding, shardings, states
from lit_sparse.recipes.estimate.step import Recipe
from lit_sparse.training import Stage


class Sizing:
    """Memory under any sharding of a config. What a row takes depends on the ranks that share it
    alone, and is simulated once for each number of them.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._rows: dict[tuple[Recipe, int], tuple[Row, ...]] = {}
        self._prefills: dict[Recipe, int] = {}

    def memory(self, sharding: Sharding) -> Memory:
        settings, recipe = self.settings, self.settings.recipe(sharding)
        itemsize = recipe.dtype.itemsize
        accumulates = settings.rows_per_step > sharding.gpus // sharding.sequence
        return Memory(
            sharding=sharding,
            states=states(sharding, settings.model, itemsize, accumulates, settings.zero),
            rows=self._rows_of(recipe, sharding.sequence),
            cache=cache_bytes(settings.model, itemsize, settings.curriculum.longest),
            prefill=self._prefill(recipe) if settings.generates else None,
        )

    def all(self, gpus: int) -> Iterator[Memory]:
        """Every sharding on exactly so many GPUs."""
        settings = self.settings
        for sharding in shardings(
            gpus, settings.rows_per_step, settings.row_tokens, settings.model.kv_heads
        ):
            yield self.memory(sharding)

    def up_to(self, gpus: int) -> list[Memory]:
        """Every sharding on a divisor of so many GPUs."""
        counts = [n for n in range(1, gpus + 1) if gpus % n == 0]
        return [memory for n in counts for memory in self.all(n)]

    def _rows_of(self, recipe: Recipe, sequence: int) -> tuple[Row, ...]:
        key = recipe, sequence
        if key not in self._rows:
            settings = self.settings
            self._rows[key] = tuple(
                row_memory(
                    settings.model,
                    recipe,
                    settings.activations,
                    settings.kinds(stage),
                    partial(settings.plan, stage.length),
                    sequence,
                )
                for stage in settings.curriculum.stages
            )
        return self._rows[key]

    def _prefill(self, recipe: Recipe) -> int:
        """Of one document as long as the last stage's, on each GPU: generation is not shared."""
        if recipe not in self._prefills:
            settings, stage = self.settings, self.settings.curriculum.stages[-1]
            plans = [
                settings.plan(stage.length, keeps, stage.length) for keeps in settings.kinds(stage)
            ]
            sizes = [prefill_memory(settings.model, recipe, plan) for plan in plans]
            self._prefills[recipe] = max(sizes)
        return self._prefills[recipe]


def stage_work(settings: Settings, stage: Stage) -> Work:
    """FLOPs of all rows of a stage."""
    return work(
        settings.model,
        settings.recipe(Sharding(1, 0)),
        settings.kinds(stage),
        partial(settings.plan, stage.length),
        rows=settings.rows_per_step * stage.steps,
    )


def smallest(memories: Iterable[Memory], gpu: Gpu) -> Memory | None:
    """The one that fits with the fewest GPUs, and then the least traffic; None if none fits."""
    fitting = [memory for memory in memories if memory.peak <= gpu.memory]
    return min(fitting, key=lambda memory: memory.sharding.cost, default=None)


_CHANGES: dict[str, dict[str, Any]] = {
    "LongContextEval's generate: false": {"generates": False},
    "model.activations: recompute": {"activations": "recompute"},
    "model.activations: offload": {"activations": "offload"},
    "model.activations: offload and model.tiled_mlp: 8": {"activations": "offload", "tiled_mlp": 8},
}
"""What is tried where nothing fits, the cheapest first."""

_MORE = (2, 4, 8)
"""Times the GPUs at hand, likewise."""


def remedies(settings: Settings, gpu: Gpu) -> Iterator[tuple[str, Memory]]:
    """What would fit where nothing does: another config, and more GPUs, each with the smallest
    sharding that then fits.
    """
    for what, change in _CHANGES.items():
        changed = replace(settings, **change)
        tiles_experts = changed.tiled_mlp is not None and settings.model.experts is not None
        if changed != settings and not tiles_experts:
            found = smallest(Sizing(changed).up_to(settings.gpus), gpu)
            if found is not None:
                yield what, found
                break
    sizing = Sizing(settings)
    for times in _MORE:
        found = smallest(sizing.all(times * settings.gpus), gpu)
        if found is not None:
            yield f"{times * settings.gpus} GPUs", found
            break
