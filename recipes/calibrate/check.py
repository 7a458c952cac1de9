"""The check on held-out documents of twice the length, with the sparse operator as it runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.attention.probe import probe_rows
from lit_sparse.budget import Budget
from lit_sparse.calibration import ChosenLaw
from lit_sparse.data import CommonWord, Passkey, Tokenizer
from lit_sparse.models import Law, dense_attention, observe, sparsify
from lit_sparse.recipes.calibrate.measure import LATE, Progress, forward, late_rows
from lit_sparse.recipes.calibrate.texts import Texts
from lit_sparse.training.loss import chunked_cross_entropy

ROWS = 64
"""Rows sampled in each document of the check."""

STEP = 1.5
"""Factor of alpha from one attempt to the next."""


@dataclass(frozen=True)
class Attempt:
    """What one law does on the held-out documents, in their last quarter.

    Statistics are over rows, heads, documents, and the layers that are not dense.
    """

    factor: float
    """Of the fitted alpha."""
    missed_p95: float
    """Of the softmax mass that the operator drops (tau)."""
    missed_mean: float
    missed_p95_by_layer: dict[int, float]
    output_error_p95: float
    """||o_dense - o_sparse|| / ||o_dense|| of a row's attention output."""
    output_error_mean: float
    density: float
    """Kept causal pairs / causal pairs."""
    loss: float
    """Nats per token."""


@dataclass(frozen=True)
class Answers:
    """A task: share of prompts answered, and the loss of the answer in nats per token."""

    right: float
    loss: float


@dataclass(frozen=True)
class Check:
    """What was found at `length` tokens; `attempts` is empty if every layer is dense."""

    length: int
    target: float
    attempts: list[Attempt]
    dense_loss: float
    tasks: dict[str, dict[str, Answers]]
    """Task -> "dense" and "sparse"."""

    @property
    def met(self) -> bool:
        return not self.attempts or self.attempts[-1].missed_p95 <= self.target

    @property
    def factor(self) -> float:
        return self.attempts[-1].factor if self.attempts else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met, "factor": self.factor}


def sparse_layers(chosen: ChosenLaw, layers: int) -> list[int]:
    """Layers that the law does not leave dense."""
    return [layer for layer in range(layers) if chosen.of(layer) != Budget.dense()]


@torch.no_grad()
def run_check(
    model: Any,
    path: Path,
    texts: Texts,
    tokenizer: Tokenizer,
    selecting: Law,
    chosen: ChosenLaw,
    length: int,
    target: float,
    steps: int,
    prompts: int,
    seed: int,
    progress: Progress,
) -> Check:
    """Hold a law against dense attention; raise its alpha while it misses too much mass.

    Args:
        model: a sparsified model; obeys the last law tried afterwards.
        texts: its held-out documents have at least `length` tokens.
        selecting: block, tile and scorer of the law.
        target: 95th percentile of the missed mass that is accepted.
        steps: laws tried at most, the first included.
        prompts: of each task; 0 for none.
        seed: of rows and prompts.
    """
    layers = sparse_layers(chosen, model.config.get_text_config().num_hidden_layers)
    documents = [texts.read(document, length) for document in texts.held_out]

    def run(said: str, watch: _Watch | None = None) -> float:
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for number, tokens in enumerate(documents, 1):
            progress(f"held-out document {number} of {len(documents)}, {length} tokens, {said}")
            if watch is not None:
                watch.rows = late_rows(length, ROWS, generator)
            hidden = forward(model, path, tokens)
            losses.append(_loss(model, hidden, tokens, int(LATE * length)))
        return sum(losses) / len(losses)

    with dense_attention(model):
        dense_loss = run("dense")
    attempts: list[Attempt] = []
    while layers and len(attempts) < steps:
        factor = STEP ** len(attempts)
        obey(model, chosen.scaled(factor), selecting)
        watch = _Watch(layers)
        with observe(model, watch, layers):
            loss = run(f"alpha times {factor:.3g}", watch)
        attempts.append(watch.attempt(factor, loss))
        if attempts[-1].missed_p95 <= target or attempts[-1].density == 1:
            break
    tasks = {}
    if prompts:
        for name, task in _tasks(texts, tokenizer, length, prompts, seed).items():
            progress(f"{name}: {prompts} prompts of {task[0].shape[1]} tokens")
            with dense_attention(model):
                tasks[name] = {"dense": _answers(model, path, *task)}
            if layers:
                tasks[name]["sparse"] = _answers(model, path, *task)
    return Check(length, target, attempts, dense_loss, tasks)


def obey(model: Any, chosen: ChosenLaw, selecting: Law) -> Law:
    """Give a model a law; returns it whole, block, tile and scorer included."""
    law = replace(selecting, budget=chosen.budget, layers=dict(chosen.layers))
    sparsify(
        model, law.budget, layers=law.layers, block=law.block, tile=law.tile, score=law.score
    )
    return law


class _Watch:
    """An observer that compares sampled rows of the sparse model with its own dense attention."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.rows = torch.empty(0, dtype=torch.int64)
        """Of the document that runs next."""
        self._missed: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._error: list[Tensor] = []
        self._density: list[float] = []

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        selection: Selection,
        scale: float,
        documents: Any,
    ) -> None:
        found = probe_rows(q, k, v, selection, self.rows, scale, out=out, lse=lse)
        self._missed[layer].append(found.tau.flatten().cpu())
        self._error.append(found.output_error.flatten().cpu())
        self._density.append(selection.density)

    def attempt(self, factor: float, loss: float) -> Attempt:
        layers = {layer: torch.cat(values) for layer, values in self._missed.items()}
        missed, error = torch.cat(list(layers.values())), torch.cat(self._error)
        return Attempt(
            factor=factor,
            missed_p95=_p95(missed),
            missed_mean=float(missed.mean()),
            missed_p95_by_layer={layer: _p95(values) for layer, values in layers.items()},
            output_error_p95=_p95(error),
            output_error_mean=float(error.mean()),
            density=sum(self._density) / len(self._density),
            loss=loss,
        )


def _p95(values: Tensor) -> float:
    # Not torch.quantile, which refuses more than 2^24 values.
    return float(values.float().kthvalue(math.ceil(0.95 * len(values))).values)


def _loss(model: Any, hidden: Tensor, tokens: Tensor, first: int) -> float:
    """Nats per token from `first` on."""
    labels = tokens[:, first:].to(hidden.device)
    head = model.get_output_embeddings()
    total = chunked_cross_entropy(hidden[:, first - 1 : -1], head, labels)
    return float(total) / labels.numel()


Prompts = tuple[np.ndarray, int, np.ndarray]


def _tasks(
    texts: Texts, tokenizer: Tokenizer, length: int, count: int, seed: int
) -> dict[str, Prompts]:
    """Prompts of the tasks; a task that this tokenizer or length does not allow is left out."""
    rng = np.random.default_rng(seed)
    made: dict[str, Prompts] = {}
    for name, make in (
        ("passkey", lambda: Passkey(tokenizer).prompts(texts.rest, length, count, rng)),
        ("common word", lambda: CommonWord(tokenizer).prompts(length, count, rng)),
    ):
        with contextlib.suppress(ValueError):
            made[name] = make()
    return made


def _answers(
    model: Any, path: Path, ids: np.ndarray, start: int, answers: np.ndarray
) -> Answers:
    right, loss = 0, 0.0
    head = model.get_output_embeddings()
    for prompt, answer in zip(torch.from_numpy(ids), torch.from_numpy(answers), strict=True):
        hidden = forward(model, path, prompt[None])
        logits = head(hidden[0, start - 1 : -1]).float().cpu()
        right += bool((logits.argmax(-1) == answer).all())
        loss += float(F.cross_entropy(logits, answer))
    return Answers(right / len(ids), loss / len(ids))
