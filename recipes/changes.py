"""What changed between the config of a run and the one that it is to go on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HARMLESS = (
    # Where things lie and what is watched: the weights after any step do not depend on it.
    "weights_only",
    "run",
    "checkpoint",
    "curriculum.validate_every",
    "data.cache_dir",
    "data.num_workers",
    "trainer.default_root_dir",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.limit_predict_batches",
    "trainer.limit_test_batches",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_time",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "trainer.strategy.DeepSpeedSparseStrategy.nvme_path",
    "trainer.strategy.DeepSpeedSparseStrategy.timeout_minutes",
    # Callbacks that only watch.
    "trainer.callbacks.CollapseMonitor",
    "trainer.callbacks.DenseGapMonitor",
    "trainer.callbacks.DeviceStatsMonitor",
    "trainer.callbacks.HuggingFaceExport",
    "trainer.callbacks.LearningRateMonitor",
    "trainer.callbacks.ModelCheckpoint",
    "trainer.callbacks.ModelSummary",
    "trainer.callbacks.LongContextEval",
    "trainer.callbacks.RichModelSummary",
    "trainer.callbacks.RichProgressBar",
    "trainer.callbacks.SparseProgressBar",
    "trainer.callbacks.StageReport",
    "trainer.callbacks.TQDMProgressBar",
    "trainer.callbacks.Throughput",
    "trainer.callbacks.Timer",
)
"""Keys, with all below them, that may change while a run goes on exactly. A key that is not here
does not: a new one has to be thought about first.
"""


@dataclass(frozen=True)
class Change:
    """A key of the config with another value. None: the key was not there, or was null."""

    key: str
    old: Any
    new: Any

    @property
    def harmless(self) -> bool:
        return any(self.key == key or self.key.startswith(f"{key}.") for key in HARMLESS)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The keys whose values differ, in the order of the new config."""
    before, after = dict(_flat("", old)), dict(_flat("", new))
    keys = dict.fromkeys([*after, *before])
    return [
        Change(key, before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings; classes by their name, other items of lists by number."""
    if isinstance(value, Mapping) and "class_path" in value:
        prefix = f"{prefix}.{value['class_path'].rpartition('.')[2]}"
        yield prefix, value["class_path"]
        yield from _flat(prefix, value.get("init_args") or {})
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), below)
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _flat(prefix if "class_path" in item else f"{prefix}[{i}]", item)
    else:
        yield prefix, value
