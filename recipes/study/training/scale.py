"""The forms of the study: what trains, on which rows, how often, and how it is evaluated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lit_sparse.budget import Budget
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.fits import shipped_keys

CONFIG = "study_finetune"


@dataclass(frozen=True)
class Form:
    """One form of the study.

    Args:
        law: that the others are measured by.
        stages: context length and optimizer steps.
        block, tile: of the selection.
        seeds: of the fine-tunes: order of the rows, tasks.
        base_keys, keys: changes to the configs of the base and of every fine-tune.
        documents, prompts: of the evaluation, at each length.
        tasks: that are asked at the shortest and the longest length.
        device: of the evaluation.
        threads: of each fine-tune.
    """

    law: Budget
    stages: Sequence[tuple[int, int]]
    block: int
    tile: int
    seeds: Sequence[int]
    base_keys: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    documents: int = 20
    prompts: int = 16
    tasks: Sequence[str] = ("passkey", "multikey", "aggregation")
    device: str = "cpu"
    threads: int = 1

    @property
    def lengths(self) -> list[int]:
        return [length for length, _ in self.stages]

    def stage_keys(self) -> dict[str, str]:
        """Of the config: the curriculum, and rows as long as its longest stage."""
        stages = [{"length": n, "steps": s, "rope": {"rule": "abf"}} for n, s in self.stages]
        return {"curriculum.stages": str(stages), "data.row_tokens": str(self.lengths[-1])}


def form(settings: Settings) -> Form:
    """The form that was asked for."""
    if settings.large:
        return _large(settings)
    config = shipped_keys(CONFIG)
    sparse = config["sparse_attention"]
    law = Budget(**sparse["budget"])
    seeds = [settings.seed + i for i in range(1 if settings.quick else 3)]
    if settings.quick:
        return Form(
            law,
            [(512, 6), (1024, 6)],
            sparse["block"],
            sparse["tile"],
            seeds,
            documents=4,
            prompts=4,
            tasks=("passkey",),
        )
    stages = [(stage["length"], stage["steps"]) for stage in config["curriculum"]["stages"]]
    return Form(law, stages, sparse["block"], sparse["tile"], seeds)


def _large(settings: Settings) -> Form:
    """1024 to 32768 tokens on one GPU, by the default law and the default block.

    A model of 76 million parameters; its base learns from 256 to 1024 tokens.
    """
    shape = {
        "hidden_size": "768",
        "intermediate_size": "2048",
        "num_hidden_layers": "12",
        "num_attention_heads": "12",
        "num_key_value_heads": "4",
        "head_dim": "64",
        "max_position_embeddings": "1024",
        "initializer_range": "0.02",
    }
    gpu = {
        **{f"model.architecture.{key}": value for key, value in shape.items()},
        "trainer.accelerator": "gpu",
        "trainer.precision": "bf16-mixed",
        "sparse_attention.block": "64",
        "sparse_attention.tile": "null",
    }
    stages = [
        {"length": n, "steps": s, "attention": "dense"} for n, s in ((256, 3000), (1024, 3000))
    ]
    base = {
        "curriculum.stages": str(stages),
        "data.row_tokens": "16384",
        "data.rows_per_step": "2",
        "model.learning_rate": "6e-4",
    }
    return Form(
        law=Budget(floor=0),
        stages=[(2048, 100), (8192, 100), (32768, 300)],
        block=64,
        tile=32,
        seeds=[settings.seed + i for i in range(3)],
        base_keys={**gpu, **base},
        keys={**gpu, "sparse_attention.tile": "32", "model.learning_rate": "2e-4"},
        device="cuda",
        threads=len(os.sched_getaffinity(0)),
    )
