"""What laws lose on text and tasks, and the keys that they read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_sparse.data.tasks import make_task, prompts
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.calibrate.check import obey
from lit_sparse.recipes.calibrate.measure import Subject
from lit_sparse.recipes.study.alpha.laws import (
    Candidate,
    calibrated,
    grid,
    open_subject,
    other_documents,
    presets,
)
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.reading import (
    Reading,
    Row,
    mixture,
    random_pieces,
    read,
    read_densely,
)
from lit_sparse.recipes.study.subjects import name_of

TEXT = "text"
TASKS = ("passkey", "multikey", "aggregation")


@dataclass(frozen=True)
class Losses:
    """What all laws lose on one kind of text.

    Args:
        name: `TEXT` or a task.
        lengths: of the documents; equally many tokens of each row have each.
        keys: that a query reads, [laws].
        loss: the loss less that of the dense model, nats per token (of the answer), [laws, rows];
            all lengths count alike.
        right: share of the answers, [laws].
        dense_loss, dense_right, dense_keys: of the dense model.
    """

    name: str
    lengths: tuple[int, ...]
    keys: np.ndarray
    loss: np.ndarray
    right: np.ndarray
    dense_loss: float
    dense_right: float
    dense_keys: float


@dataclass(frozen=True)
class Measured:
    """One model; `dense` are the targets whose calibration leaves every layer dense."""

    name: str
    context: int
    laws: list[Candidate]
    losses: list[Losses]
    dense: list[str]

    def of_kind(self, kind: str) -> np.ndarray:
        """Numbers of the laws of a kind."""
        return np.array([i for i, law in enumerate(self.laws) if law.kind == kind], dtype=int)


def measure(settings: Settings, path: Path) -> Measured:
    """Calibrate a model, and run it under every law on text and tasks.

    Raises:
        BadArgument: the model cannot be used.
    """
    subject, context = open_subject(settings, path)
    rows = _rows(settings, subject, context)
    with warnings.catch_warnings():
        # That a law is below what is always kept: the keys that are read are what counts.
        warnings.filterwarnings("ignore", message=".*always kept", category=UserWarning)
        found_laws, dense_targets = calibrated(settings, subject, context)
    laws = [*found_laws, *grid(settings, context), *presets(context)]
    dense = {name: [read_densely(subject.model, row) for row in own] for name, own in rows.items()}
    found: dict[str, list[list[Reading]]] = {name: [] for name in rows}
    for number, law in enumerate(laws, 1):
        settings.progress(f"{path}: law {number} of {len(laws)}, {law.kind} {law.name}")
        obey(subject, law.chosen)
        for name, own in rows.items():
            found[name].append([read(subject.model, row) for row in own])
    losses = [_losses(name, rows[name], dense[name], found[name]) for name in rows]
    return Measured(name_of(path), context, laws, losses, dense_targets)


def _rows(settings: Settings, subject: Subject, context: int) -> dict[str, list[Row]]:
    """Rows of text and of each task, which mix lengths."""
    count = 2 if settings.quick else 10
    rng = np.random.default_rng(settings.seed)
    documents = other_documents(subject)
    lengths = mixture(context // 4, context)
    rows = {TEXT: [Row.pack(random_pieces(documents, lengths, rng)) for _ in range(count)]}
    for name in TASKS:
        task = make_task(name, subject.tokenizer)
        if task.shortest > context:
            raise BadArgument(
                f"MODEL {subject.path}: {name} needs {task.shortest} tokens, the context is "
                f"{context}"
            )
        own = tuple(length for length in lengths if length >= task.shortest)
        asked: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
        for length in sorted(set(own)):
            each = own.count(length)
            made = prompts(task, documents, length, count * each, rng)
            # Depths rise along the prompts: every row has some of all.
            for place in range(count * each):
                ids = torch.from_numpy(made.ids[place])
                asked[place % count].append((ids, torch.from_numpy(made.answer[place])))
        rows[name] = [Row.pack(*zip(*row, strict=True)) for row in asked]
    return rows


def _losses(
    name: str, rows: Sequence[Row], dense: Sequence[Reading], found: Sequence[Sequence[Reading]]
) -> Losses:
    lengths = np.array(rows[0].lengths)
    # Equally many tokens have each length, so short documents are many: each length counts alike.
    weight = np.array([1 / np.sum(lengths == length) for length in lengths])
    weight /= weight.sum()

    def mean(readings: Sequence[Reading], what: str) -> np.ndarray:
        """[rows]"""
        return np.array([getattr(reading, what) @ weight for reading in readings])

    dense_loss = mean(dense, "loss")
    return Losses(
        name,
        tuple(sorted(set(rows[0].lengths))),
        np.array([np.mean([reading.keys for reading in law]) for law in found]),
        np.array([mean(law, "loss") - dense_loss for law in found]),
        np.array([mean(law, "right").mean() for law in found]),
        float(dense_loss.mean()),
        float(mean(dense, "right").mean()),
        dense[0].keys,
    )
