"""What one fine-tuned model reaches, with its own attention and densely."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lit_sparse.evaluation import DENSE, LOSS, SPARSE, Answers, PositionLoss, Questions, evaluate
from lit_sparse.recipes.evaluate.subject import Loading, load
from lit_sparse.recipes.study.fits import seconds
from lit_sparse.recipes.study.training.arms import Arm
from lit_sparse.recipes.study.training.scale import Form


@dataclass(frozen=True)
class Result:
    """A run.

    Args:
        losses: length -> of its own attention.
        dense_losses: length -> of the same model run densely; those of `losses` where it is dense.
        answers: task -> length -> of its own attention.
        captured: dense softmax mass on the kept keys in the last training stage, on sampled rows.
        tokens_per_second: of the last training stage.
        seconds: wall time of the run, start included.
    """

    arm: Arm
    seed: int
    losses: dict[int, PositionLoss]
    dense_losses: dict[int, PositionLoss]
    answers: dict[str, dict[int, Answers]]
    captured: float | None
    tokens_per_second: float
    seconds: float

    @property
    def longest(self) -> int:
        return max(self.losses)

    def loss(self, length: int) -> float:
        """Nats per token over all positions of texts of a length."""
        return float(self.losses[length].of_texts().mean())

    def gap(self, length: int) -> float:
        """Loss by its own attention minus that of the same model run densely."""
        return self.loss(length) - float(self.dense_losses[length].of_texts().mean())


def measure_all(
    runs: Sequence[tuple[Path, Arm, int]], form: Form, evaluation_seed: int
) -> list[Result]:
    """Evaluate the models that runs (directory, arm, seed) have left, as many at a time as there
    are cores for.
    """
    workers = max(len(os.sched_getaffinity(0)) // form.threads, 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (form.threads,)) as pool:
        found = [pool.submit(measure, *run, form, evaluation_seed) for run in runs]
        return [future.result() for future in found]


def measure(run: Path, arm: Arm, seed: int, form: Form, evaluation_seed: int) -> Result:
    """Evaluate the model that a run has left."""
    loading = Loading(
        budget=None,
        block=None,
        tile=None,
        lengths=form.lengths,
        rope=None,
        data="stdlib",
        all_documents=False,
        dtype="float32",
        device=form.device,
    )
    subject = load(run, loading)
    losses = Questions(form.lengths, [LOSS], documents=form.documents, seed=evaluation_seed)
    answers = Questions(
        [form.lengths[0], form.lengths[-1]],
        form.tasks,
        prompts=form.prompts,
        dense=False,
        seed=evaluation_seed,
    )
    texts, prompts = (
        evaluate(subject.model, subject.tokenizer, subject.documents, questions)
        for questions in (losses, answers)
    )
    side = SPARSE if any(SPARSE in sides for sides in texts.losses.values()) else DENSE
    stage = json.loads((run / "stages.json").read_text(encoding="utf-8"))[-1]
    return Result(
        arm=arm,
        seed=seed,
        losses={length: sides[side] for length, sides in texts.losses.items()},
        dense_losses={length: sides[DENSE] for length, sides in texts.losses.items()},
        answers={
            task: {length: sides[side] for length, sides in at.items()}
            for task, at in prompts.answers.items()
        },
        captured=stage.get("gap/captured_mass"),
        tokens_per_second=stage["tokens_per_second"],
        seconds=seconds(run),
    )


def by_arm(results: list[Result]) -> dict[str, list[Result]]:
    """Name of the arm -> its runs, by seed."""
    names = dict.fromkeys(result.arm.name for result in results)
    return {name: [r for r in results if r.arm.name == name] for name in names}


def relative_losses(
    own: list[Result], other: list[Result], length: int, late: bool = False
) -> np.ndarray:
    """Of each held-out text, how far the loss is above another arm's, as a share of the mean of
    that: the mean over seeds, float64 [texts].

    Args:
        late: of the last quarter of the texts alone.
    """

    def losses(result: Result) -> np.ndarray:
        found = result.losses[length]
        return found.late if late else found.of_texts()

    differences = [losses(a) - losses(b) for a, b in zip(own, other, strict=True)]
    return np.mean(differences, 0) / np.mean([losses(result).mean() for result in other])
