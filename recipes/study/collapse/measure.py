"""One model, measured: how sharp its attention is, what it loses on text, what it retrieves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_sparse.attention.probe import probe_rows, sample_rows
from lit_sparse.attention.row_statistics import RowStatistics
from lit_sparse.budget import Budget
from lit_sparse.callbacks import CollapseLimits
from lit_sparse.callbacks.collapse_metrics import SATURATED
from lit_sparse.data import Documents, Tokenizer
from lit_sparse.data.tasks import Prompts, make_task, prompts
from lit_sparse.evaluation import ask
from lit_sparse.models import is_sparse, law_layers, observe, sparsify

TASKS = ("passkey", "multikey")
CHANCE = 0.1
"""Share of answer tokens, digits, that a guess gets right."""

_LIMITS = CollapseLimits()


@dataclass(frozen=True)
class Probe:
    """What models are asked at one length; the same for all that are compared."""

    length: int
    texts: Tensor
    """int64 [texts, length]"""
    tasks: Mapping[str, Prompts]
    rows: int
    """Sampled rows of the texts together, that see half of the length or more."""


def shortest(tokenizer: Tokenizer) -> int:
    """Tokens of the shortest prompt that can carry each of the tasks."""
    return max(make_task(name, tokenizer).shortest for name in TASKS)


@dataclass(frozen=True)
class Sizes:
    """How much is asked: texts, prompts of each task, sampled rows."""

    texts: int
    prompts: int
    rows: int

    def draw(self, documents: Documents, tokenizer: Tokenizer, length: int, seed: int) -> Probe:
        """Windows of documents, and prompts planted into others."""
        rng = np.random.default_rng([seed, length])
        sizes = documents.lengths - 1
        there = np.flatnonzero(sizes >= length)
        windows = []
        for document in rng.choice(there, self.texts, replace=len(there) < self.texts):
            start = int(rng.integers(sizes[document] - length + 1))
            windows.append(documents.read(int(document), start, length).astype(np.int64))
        tasks = {
            name: prompts(make_task(name, tokenizer), documents, length, self.prompts, rng)
            for name in TASKS
        }
        return Probe(length, torch.from_numpy(np.stack(windows)), tasks, self.rows)


@dataclass(frozen=True)
class Measured:
    """One model at one length."""

    length: int
    loss: float
    """Of text, in nats a token."""
    right: np.ndarray
    """[prompts], those of all `TASKS` one after the other: share of the answer's tokens that are
    the model's first choice, given those before."""
    sharpness: Mapping[str, float]
    """See `sharpness`."""

    @property
    def accuracy(self) -> float:
        """Share of answer tokens, mean over tasks."""
        return float(self.right.mean())

    def of_task(self, name: str) -> float:
        """The same of one task."""
        return float(np.split(self.right, len(TASKS))[TASKS.index(name)].mean())


@torch.no_grad()
def measure(model: Any, probe: Probe) -> Measured:
    """Run a model, densely, over all that a probe asks."""
    if not is_sparse(model):
        sparsify(model, Budget.dense())
    model.eval()
    rows: dict[int, RowStatistics] = {}

    def observer(layer: int, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> None:
        _, _, selection, options, _ = others
        generator = torch.Generator().manual_seed(probe.length)
        chosen = sample_rows(selection.plan, probe.rows, generator, probe.length // 2)
        rows[layer] = probe_rows(q, k, v, selection, chosen, options)

    with observe(model, observer, law_layers(model)):
        logits = model(probe.texts, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), probe.texts[:, 1:].flatten())
    right = np.concatenate([ask(model, probe.tasks[name]).hits.mean(1) for name in TASKS])
    return Measured(probe.length, float(loss), right, sharpness(list(rows.values())))


def sharpness(layers: Sequence[RowStatistics]) -> dict[str, float]:
    """How concentrated or dispersed attention is: means over rows, heads and layers, as
    callbacks/README.md explains them, and the largest `logit_max`.

    Besides what `CollapseMonitor` compares with its limits: `concentrated` and `dispersed` are the
    shares of heads past them, `layer_saturated` and `layer_gamma` those of the layer where they
    are largest.
    """

    def stack(name: str) -> Tensor:
        """[layers, R, H]"""
        return torch.stack([getattr(rows, name) for rows in layers])

    names = ("entropy_ratio", "gamma", "gamma_of_entropy", "max_weight", "jacobian_trace")
    found = {name: stack(name) for name in names}
    least = torch.minimum(found["gamma"].mean(1), found["gamma_of_entropy"].mean(1))
    sharp, even = stack("entropy_ratio_without_sink").mean(1), found["entropy_ratio"].mean(1)
    saturated = (stack("max_weight_without_sink") > SATURATED).float()
    return {name: float(value.mean()) for name, value in found.items()} | {
        "saturated": float(saturated.mean()),
        "logit_max": float(stack("logit_max").max()),
        "concentrated": float((sharp < _LIMITS.concentration).float().mean()),
        "dispersed": float((even > _LIMITS.dispersion).float().mean()),
        "layer_saturated": float(saturated.mean((1, 2)).max()),
        "layer_gamma": float(least.mean(1).max()),
    }
