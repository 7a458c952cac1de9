"""The whole evaluation: every task at every length, with dense attention and by the model's law."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.budget import Budget
from lit_sparse.data import Documents, Tokenizer
from lit_sparse.data.tasks import TASKS, make_task
from lit_sparse.data.tasks import prompts as make_prompts
from lit_sparse.evaluation.answers import Answers, ask
from lit_sparse.evaluation.perplexity import PositionLoss, position_loss, position_ranges
from lit_sparse.models import budget_of, dense_attention, is_sparse, law_layers, observe

LOSS = "ppl"
"""Name of the loss by position among the tasks."""

NAMES = (LOSS, *TASKS)
"""All tasks."""

DENSE, SPARSE = "dense", "sparse"
"""How a number was measured: with every key, or with those of the model's law."""

Progress = Callable[[str], None]

T = TypeVar("T")


@dataclass(frozen=True)
class Questions:
    """What to evaluate.

    Args:
        lengths: tokens of a text or prompt, ascending.
        tasks: some of `NAMES`.
        documents: texts at each length, at most.
        prompts: of each task at each length, at evenly spaced depths.
        dense: whether a sparse model is asked with dense attention too.
        generate: whether answers are generated as well.
        seed: of texts and prompts, which are the same at one length whatever else is asked.
        longest: tokens of the longest text that losses by position are compared with; None: the
            last of the lengths.

    Raises:
        ValueError: a value is out of its range.
    """

    lengths: Sequence[int]
    tasks: Sequence[str] = NAMES
    documents: int = 16
    prompts: int = 20
    dense: bool = True
    generate: bool = False
    seed: int = 0
    longest: int | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks if name not in NAMES]:
            raise ValueError(f"tasks: there is no {unknown[0]!r}; there are {', '.join(NAMES)}")
        for name in ("lengths", "tasks"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, each once, got {list(values)}")
        if min(self.lengths) < 2 or sorted(self.lengths) != list(self.lengths):
            raise ValueError(f"lengths must rise and be >= 2, got {list(self.lengths)}")
        for name, least in (("documents", 1), ("prompts", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class LeftOut:
    """What could not be asked, and why; a length of None: nowhere."""

    task: str
    length: int | None
    why: str


@dataclass(frozen=True)
class Evaluation:
    """What was found. Measurements are by `DENSE` and `SPARSE`; a model without a law, or whose
    every layer is dense, has the first only.
    """

    losses: dict[int, dict[str, PositionLoss]] = field(default_factory=dict)
    """Length -> measurements."""
    answers: dict[str, dict[int, dict[str, Answers]]] = field(default_factory=dict)
    """Task -> length -> measurements."""
    density: dict[int, float] = field(default_factory=dict)
    """Length -> kept causal pairs / causal pairs of the layers that are sparse; 1 where the law
    keeps every key, and both measurements are of dense attention.
    """
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether every loss is."""
        answers = [sides for at in self.answers.values() for sides in at.values()]
        measured: list[Mapping[str, Any]] = [*self.losses.values(), *answers]
        return all(np.isfinite(own.nats).all() for sides in measured for own in sides.values())


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    documents: Documents,
    questions: Questions,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Ask a causal language model everything; what a length, the text or the tokenizer does not
    allow is left out.

    Each length is run by itself: where RoPE follows the length of the text (dynamic, longrope) its
    first tokens have other losses in a longer one.

    Args:
        model: a transformers model, sparsified or not, in evaluation mode.
        tokenizer: of the model.
        documents: that the model was not trained on.
        questions: what to ask.
        progress: told what is done next.
    """
    found, sides = Evaluation(), _Sides(model, questions.dense)
    for name in questions.tasks:
        results: dict[int, dict[str, Any]] = {}
        try:
            measurement = (
                _losses(model, documents, questions)
                if name == LOSS
                else _answers(model, name, tokenizer, documents, questions)
            )
        except ValueError as error:
            found.left_out.append(LeftOut(name, None, str(error)))
            continue
        for length in questions.lengths:
            try:
                measure = measurement(length)
            except ValueError as error:
                found.left_out.append(LeftOut(name, length, str(error)))
                continue
            results[length] = sides.measure(measure, partial(_say, progress, name))
            found.density.update(sides.density(length))
        if name == LOSS:
            found.losses.update(results)
        elif results:
            found.answers[name] = results
    return found


def cut_texts(documents: Documents, length: int, longest: int, count: int, seed: int) -> Tensor:
    """The first `length` tokens of some documents: int64 [at most `count`, length].

    Those that have `longest` tokens come first, so that different lengths are of the same
    documents where there are enough.

    Raises:
        ValueError: no document is so long.
    """
    sizes = documents.text_lengths
    if (most := int(sizes.max(initial=0))) < length:
        raise ValueError(f"no document is so long, the longest has {most} tokens")
    order = np.random.default_rng(seed).permutation(len(documents))
    order = order[np.argsort(-np.minimum(sizes[order], longest), kind="stable")]
    chosen = order[sizes[order] >= length][:count].tolist()
    texts = [documents.read(document, 0, length).astype(np.int64) for document in chosen]
    return torch.from_numpy(np.stack(texts))


_Measurement = Callable[[int], Callable[[Progress], Any]]
"""Length -> what measures at it."""


def _losses(model: Any, documents: Documents, asked: Questions) -> _Measurement:
    def at(length: int) -> Callable[[Progress], PositionLoss]:
        longest = asked.longest or asked.lengths[-1]
        texts = cut_texts(documents, length, longest, asked.documents, asked.seed)
        return partial(position_loss, model, texts, position_ranges(length, longest))

    return at


def _answers(
    model: Any, name: str, tokenizer: Tokenizer, documents: Documents, asked: Questions
) -> _Measurement:
    task = make_task(name, tokenizer)

    def at(length: int) -> Callable[[Progress], Answers]:
        if length < task.shortest:
            raise ValueError(f"a prompt needs {task.shortest} tokens")
        rng = np.random.default_rng([asked.seed, crc32(name.encode()), length])
        prompts = make_prompts(task, documents, length, asked.prompts, rng)
        return partial(ask, model, prompts, asked.generate)

    return at


def _say(progress: Progress, where: str, what: str) -> None:
    progress(f"{where}, {what}")


class _Sides:
    """Measures with dense attention and by the law, and what share of the pairs the law keeps."""

    def __init__(self, model: Any, dense: bool) -> None:
        self._model, self._dense = model, dense
        layers = law_layers(model) if is_sparse(model) else []
        # Of the moment: training may be in a dense stage.
        self._layers = [n for n in layers if budget_of(model, n) != Budget.dense()]
        self._densities: list[float] = []

    def measure(self, measure: Callable[[Progress], T], progress: Progress) -> dict[str, T]:
        if not self._layers:
            return {DENSE: measure(partial(_say, progress, DENSE))}
        found = {}
        if self._dense:
            with dense_attention(self._model):
                found[DENSE] = measure(partial(_say, progress, DENSE))
        with observe(self._model, self._note, self._layers):
            found[SPARSE] = measure(partial(_say, progress, SPARSE))
        return found

    def density(self, length: int) -> dict[int, float]:
        """Of what was measured last, at a length; nothing where there was no sparse layer."""
        densities, self._densities = self._densities, []
        return {length: float(np.mean(densities))} if densities else {}

    def _note(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        selection: Selection,
        *others: Any,
    ) -> None:
        if len(q) == len(k):  # no step of generation
            self._densities.append(selection.density)
