"""The check on held-out documents of twice the length, with the sparse operator as it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.attention.options import Options
from lit_sparse.attention.probe import probe_rows
from lit_sparse.budget import Budget
from lit_sparse.calibration import ChosenLaw
from lit_sparse.evaluation import Answers, Questions, evaluate
from lit_sparse.models import Law, dense_attention, observe, sparsify
from lit_sparse.models.head import language_head
from lit_sparse.recipes.calibrate.measure import Progress, Subject, late_rows, late_start
from lit_sparse.training.loss import chunked_cross_entropy

ROWS = 64
"""Rows sampled in each document of the check."""

STEP = 1.5
"""Factor of alpha from one attempt to the next, while the target is missed."""

TASKS = ("passkey", "aggregation")
"""What is asked: of one place in a text, and of all of it."""

# Between a factor that meets the target and one that does not: near enough.
_CLOSE = 1.1


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
class Check:
    """What was found at `length` tokens; `attempts` is empty if every layer is dense."""

    length: int
    target: float
    attempts: list[Attempt]
    dense_loss: float
    tasks: dict[str, dict[str, Answers]]
    """Task -> "dense" and "sparse"."""
    left_out: dict[str, str]
    """Tasks that were not run, and why."""

    @property
    def final(self) -> Attempt | None:
        """The least alpha that meets the target, or the largest that was tried."""
        if not self.attempts:
            return None
        meeting = [a for a in self.attempts if a.missed_p95 <= self.target]
        if meeting:
            return min(meeting, key=lambda a: a.factor)
        return max(self.attempts, key=lambda a: a.factor)

    @property
    def met(self) -> bool:
        return self.final is None or self.final.missed_p95 <= self.target

    @property
    def factor(self) -> float:
        return 1.0 if self.final is None else self.final.factor

    def to_dict(self) -> dict[str, Any]:
        tasks = {
            task: {side: {"right": a.accuracy.mean, "loss": a.loss} for side, a in sides.items()}
            for task, sides in self.tasks.items()
        }
        plain = asdict(replace(self, tasks={}))
        return {**plain, "tasks": tasks, "met": self.met, "factor": self.factor}


def sparse_layers(chosen: ChosenLaw, layers: Sequence[int]) -> list[int]:
    """Those of the layers that the law does not leave dense."""
    return [layer for layer in layers if chosen.of(layer) != Budget.dense()]


@torch.no_grad()
def run_check(
    subject: Subject,
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
        subject: its model obeys the law that is found afterwards; its held-out documents have at
            least `length` tokens.
        chosen: the law to begin with.
        target: 95th percentile of the missed mass that is accepted.
        steps: laws tried at most, the first included.
        prompts: of each task; 0 for none.
        seed: of rows and prompts.
        progress: told what is done next.
    """
    model, texts = subject.model, subject.texts
    layers = sparse_layers(chosen, subject.layers)
    documents = [texts.read(document, length) for document in texts.held_out]

    def run(said: str, watch: _Watch | None = None) -> float:
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for number, tokens in enumerate(documents, 1):
            progress(f"held-out document {number} of {len(documents)}, {length} tokens, {said}")
            if watch is not None:
                watch.rows = late_rows(length, ROWS, generator)
            losses.append(_loss(model, subject.forward(tokens), tokens, late_start(length)))
        return sum(losses) / len(losses)

    with dense_attention(model):
        dense_loss = run("dense")

    def attempt(factor: float) -> Attempt:
        obey(subject, raised(chosen, factor))
        watch = _Watch(layers)
        with observe(model, watch, layers):
            loss = run(f"alpha times {factor:.3g}", watch)
        return watch.attempt(factor, loss)

    attempts = _search(attempt, target, steps) if layers else []
    found = Check(length, target, attempts, dense_loss, {}, {})
    obey(subject, raised(chosen, found.factor))
    if not prompts:
        return found
    questions = Questions([length], TASKS, prompts=prompts, seed=seed)
    asked = evaluate(model, subject.tokenizer, texts.text, questions, progress)
    tasks = {task: at[length] for task, at in asked.answers.items()}
    return replace(found, tasks=tasks, left_out={what.task: what.why for what in asked.left_out})


def _search(attempt: Callable[[float], Attempt], target: float, steps: int) -> list[Attempt]:
    """Raise alpha until the target is met, then close in on the least that meets it."""
    tried = [attempt(1.0)]
    missing, meeting = 1.0, math.inf
    while len(tried) < steps and tried[0].missed_p95 > target and meeting / missing > _CLOSE:
        factor = missing * STEP if math.isinf(meeting) else math.sqrt(missing * meeting)
        tried.append(attempt(factor))
        if tried[-1].missed_p95 <= target:
            meeting = factor
        else:
            missing = factor
    return tried


def raised(chosen: ChosenLaw, factor: float) -> ChosenLaw:
    """A law with every alpha times a factor, to four digits; dense layers stay dense."""

    def tidy(budget: Budget) -> Budget:
        return replace(budget, alpha=float(f"{budget.alpha:.4g}"))

    law = chosen.scaled(factor)
    layers = {layer: tidy(budget) for layer, budget in law.layers.items()}
    return replace(law, budget=tidy(law.budget), layers=layers)


def obey(subject: Subject, chosen: ChosenLaw) -> Law:
    """Give the model a law; returns it whole, block, tile and scorer included."""
    law = replace(subject.selecting, budget=chosen.budget, layers=dict(chosen.layers))
    sparsify(
        subject.model,
        law.budget,
        layers=law.layers,
        block=law.block,
        tile=law.tile,
        score=law.score,
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
        options: Options,
        documents: Any,
    ) -> None:
        found = probe_rows(q, k, v, selection, self.rows, options, out=out, lse=lse)
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
    head = language_head(model)
    total = chunked_cross_entropy(hidden[:, first - 1 : -1], head, labels)
    return float(total) / labels.numel()
