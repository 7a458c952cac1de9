"""What an estimate finds, and its numbers for a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_sparse.recipes.estimate.compute import Work
from lit_sparse.recipes.estimate.gpus import Gpu
from lit_sparse.recipes.estimate.memory import PARTS, Memory
from lit_sparse.recipes.estimate.settings import Settings
from lit_sparse.recipes.estimate.sizing import Sizing, smallest, stage_work


@dataclass(frozen=True)
class Estimate:
    """The work of a config, and its memory under every sharding.

    Args:
        gpus: the kinds that are asked for.
        utilisation: share of their peak that training reaches.
        work: of each curriculum stage.
        memories: of every sharding on a divisor of the GPUs at hand.
        own: of the config's own sharding, where it says how it shards.
    """

    settings: Settings
    gpus: Sequence[Gpu]
    utilisation: float
    work: Sequence[Work]
    memories: Sequence[Memory]
    own: Memory | None

    @classmethod
    def of(cls, settings: Settings, gpus: Sequence[Gpu], utilisation: float) -> Estimate:
        sizing = Sizing(settings)
        return cls(
            settings=settings,
            gpus=gpus,
            utilisation=utilisation,
            work=[stage_work(settings, stage) for stage in settings.curriculum.stages],
            memories=sizing.up_to(settings.gpus),
            own=None if settings.own is None else sizing.memory(settings.own),
        )

    @property
    def used(self) -> int:
        """GPUs at hand, as far as rows and heads can be divided among them."""
        return max(memory.sharding.gpus for memory in self.memories)

    def days(self, gpu: Gpu, gpus: int) -> float:
        """Of all stages, on so many GPUs."""
        return sum(work.days(gpu, gpus, self.utilisation) for work in self.work)

    def tokens(self, steps: int) -> int:
        """Of so many optimizer steps."""
        return steps * self.settings.rows_per_step * self.settings.row_tokens

    def to_dict(self) -> dict[str, Any]:
        """All numbers: bytes, FLOPs, days."""
        settings, model = self.settings, self.settings.model
        return {
            "model": {
                name: getattr(model, name)
                for name in (
                    "parameters",
                    "trained",
                    "matrices",
                    "head",
                    "mlp",
                    "largest",
                    "layers",
                )
            },
            "precision": settings.precision,
            "activations": settings.activations,
            "utilisation": self.utilisation,
            "gpus": {gpu.name: {"memory": gpu.memory, "tflops": gpu.tflops} for gpu in self.gpus},
            "stages": [
                {
                    "length": stage.length,
                    "steps": stage.steps,
                    "tokens": self.tokens(stage.steps),
                    **asdict(work),
                    "days": {
                        gpu.name: work.days(gpu, self.used, self.utilisation) for gpu in self.gpus
                    },
                }
                for stage, work in zip(settings.curriculum.stages, self.work, strict=True)
            ],
            "shardings": [self._entry(memory) for memory in self.memories],
            "own": self.own and self._entry(self.own),
            "smallest": {
                gpu.name: (best := smallest(self.memories, gpu)) and self._entry(best)
                for gpu in self.gpus
            },
        }

    def _entry(self, memory: Memory) -> dict[str, Any]:
        return {
            **asdict(memory.sharding),
            "states": asdict(memory.states),
            "rows": [
                {"backward": {name: row.backward[name] for name in PARTS}}
                | {name: getattr(row, name) for name in ("kept", "logits", "cpu", "peak")}
                for row in memory.rows
            ],
            "cache": memory.cache,
            "prefill": memory.prefill,
            "peak": memory.peak,
            "moment": memory.moment,
            "cpu_of_node": memory.cpu(self.settings.per_node),
            "days": {gpu.name: self.days(gpu, memory.sharding.gpus) for gpu in self.gpus},
        }
