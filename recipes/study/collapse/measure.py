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

TASKS = ("passkey", "multikey", "aggregation")
"""Two that one key answers, and one that takes a mean of many."""

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
    """Tokens of the shortest prompt that can carry each of `TASKS`."""
    return max(make_task(name, tokenizer).shortest for name in TASKS)


@dataclass(frozen=True)
class Sizes:
    """How much is asked: texts, prompts of each task, sampled rows."""

    texts: int
    prompts: int
    rows: int

    def draw(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        length: int,
        tasks: Sequence[str],
        seed: int,
    ) -> Probe:
        """Windows of documents, and tasks planted into others."""
        rng = np.random.default_rng([seed, length])
        sizes = documents.text_lengths
        there = np.flatnonzero(sizes >= length)
        windows = []
        for document in rng.choice(there, self.texts, replace=len(there) < self.texts):
            start = int(rng.integers(sizes[document] - length + 1))
            windows.append(documents.read(int(document), start, length).astype(np.int64))
        asked = {
            name: prompts(make_task(name, tokenizer), documents, length, self.prompts, rng)
            for name in tasks
        }
        return Probe(length, torch.from_numpy(np.stack(windows)), asked, self.rows)


@dataclass(frozen=True)
class Measured:
    """One model at one length."""

    length: int
    losses: np.ndarray
    """[texts], in nats a token."""
    right: Mapping[str, np.ndarray]
    """Task -> [prompts], 1 where each token of the answer is the first choice, given those before;
    else 0."""
    sharpness: Mapping[str, float]
    """See `sharpness`."""

    @property
    def loss(self) -> float:
        """Mean of the texts."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Share of prompts that are answered right, mean of the tasks."""
        return float(np.mean([own.mean() for own in self.right.values()]))


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
    losses = F.cross_entropy(logits[:, :-1].mT, probe.texts[:, 1:], reduction="none").mean(1)
    right = {name: ask(model, asked).right.astype(float) for name, asked in probe.tasks.items()}
    return Measured(probe.length, losses.numpy(), right, sharpness(list(rows.values())))


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
