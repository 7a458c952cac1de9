"""Windows in a trained model, with the operator as it runs, on rows that mix document lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lit_sparse.budget import Budget
from lit_sparse.models import sparsify
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.study import subjects
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.reading import (
    BLOCK,
    LOCAL,
    LONGEST,
    SINK,
    TILE,
    Row,
    mixture,
    random_pieces,
    read,
    read_densely,
)
from lit_sparse.recipes.study.windows.cost import CONSTANT, RULES, executed_keys, solve

SHORTEST = 32 * BLOCK
"""Tokens that a model's context must have at least, so that windows differ."""

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8)
"""Of the longest context: keys of the constant windows."""

NORMS = ("loss difference", "missed mass", "relative output error")
"""Against the dense model in nats per token; tau; ||o_dense - o_sparse|| / ||o_dense||. The last
two compare a layer with its own dense attention on the same inputs."""

_STRIDE = 16


@dataclass(frozen=True)
class Trained:
    """What windows of equal cost lose in one model.

    Args:
        name: of the model.
        lengths: of documents; equally many tokens of each row have each.
        executed: keys that a query reads, measured, [costs, rules].
        values: [norms, costs, rules, lengths, rows], of the same rows for everything.
        dense_loss: nats per token, [lengths].
    """

    name: str
    lengths: tuple[int, ...]
    executed: np.ndarray
    values: np.ndarray
    dense_loss: np.ndarray

    @property
    def costs(self) -> tuple[float, ...]:
        """Of the constant windows."""
        return tuple(self.executed[:, RULES.index(CONSTANT)].tolist())

    def of(self, norm: str) -> np.ndarray:
        """[costs, rules, lengths, rows]."""
        return self.values[NORMS.index(norm)]


def measure(settings: Settings, path: Path) -> Trained:
    """Run one model on rows of Python's source under every window.

    Raises:
        BadArgument: the model cannot be used.
    """
    subject = subjects.trained(path)
    if subject.context < SHORTEST:
        raise BadArgument(
            f"MODEL {path} has positions for {subject.context} tokens; windows are compared in "
            f"contexts of {SHORTEST} or more"
        )
    model, (text, _) = subject.model, subject.documents
    shortest = min(subject.context, LONGEST) // 8
    documents = mixture(shortest, 8 * shortest)
    lengths = tuple(sorted(set(documents)))
    count, shares = (4, SHARES[:3]) if settings.quick else (24, SHARES)
    rng = np.random.default_rng(settings.seed)
    try:
        rows = [Row.pack(random_pieces(text, documents, rng)) for _ in range(count)]
    except ValueError as error:
        raise BadArgument(f"MODEL {path}: {error}") from error
    offsets = rng.integers(_STRIDE, size=count).tolist()
    sampled = [
        torch.arange(offset, len(row.tokens), _STRIDE)
        for offset, row in zip(offsets, rows, strict=True)
    ]
    own = [np.flatnonzero(np.array(documents) == length) for length in lengths]

    def by_length(values: np.ndarray) -> np.ndarray:
        """[documents] -> [lengths]"""
        return np.array([np.nanmean(values[places]) for places in own])

    def cost(budget: Budget) -> float:
        return executed_keys(budget, documents, BLOCK, TILE)

    settings.progress(f"{path}: dense")
    dense = [read_densely(model, row) for row in rows]
    executed = np.empty((len(shares), len(RULES)))
    values = np.empty((len(NORMS), len(shares), len(RULES), len(lengths), count))
    for i, share in enumerate(shares):
        keys = BLOCK * round(share * max(lengths) / BLOCK)
        target = cost(CONSTANT.make(keys, sink=SINK, local=LOCAL))
        for j, rule in enumerate(RULES):
            settings.progress(f"{path}: {rule.name} at the cost of {keys} keys")
            budget = solve(rule, cost, target, sink=SINK, local=LOCAL)
            sparsify(model, budget, block=BLOCK, tile=TILE)
            read_keys = []
            for r, row in enumerate(rows):
                found = read(model, row, sampled[r])
                read_keys.append(found.keys)
                values[:, i, j, :, r] = [
                    by_length(found.loss - dense[r].loss),
                    by_length(found.missed),
                    by_length(found.output_error),
                ]
            executed[i, j] = np.mean(read_keys)
    dense_loss = np.mean([by_length(found.loss) for found in dense], axis=0)
    return Trained(subject.name, lengths, executed, values, dense_loss)
