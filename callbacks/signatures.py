"""Two signs that a law is wrong: error that more keys do not cure, and a gap that grows with n."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor

from lit_sparse.callbacks.alerts import Place
from lit_sparse.callbacks.dense_comparison import Gap
from lit_sparse.callbacks.sampled import log2_bucket
from lit_sparse.callbacks.sampler import Sample

GROWTH = 1.5
"""Times as many keys that count as a larger budget."""
SAME = 1.2
"""Times as many keys, or as few, that still count as the same budget."""
FALL = 0.25
"""Error should fall like keys^-FALL at least: half of what independent values give."""
STANDARD_ERRORS = {"persistent_error": 2.0, "gap_grows_with_length": 3.0}

_PHASES = 16
_LEAST_ROWS, _LEAST_TOKENS, _LEAST_DOCUMENTS = 8, 64, 6

Phase = list[list[float]]
"""The last measurements under one budget, [keys, value] each."""


class Phases:
    """Values measured at equal contexts, apart by how many keys the law gave them.

    Args:
        patience: measurements that a phase must have to be compared; it is remembered, and judged,
            by at most twice as many.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.most = patience, 2 * patience
        self._phases: dict[str, list[Phase]] = {}
        self._measured: dict[str, int] = {}
        """Measurements of the newest phase."""

    def add(self, place: str, keys: float, value: float) -> None:
        phases = self._phases.setdefault(place, [])
        if not phases or abs(math.log(keys / _mean(phases[-1], 0))) > math.log(SAME):
            phases.append([])
            self._measured[place] = 0
        phases[-1] = [*phases[-1], [keys, value]][-self.most :]
        self._measured[place] += 1
        del phases[:-_PHASES]

    def before_and_now(self, place: str) -> tuple[Phase, Phase] | None:
        """The newest phase, and the one before it that had at most 1 / GROWTH of its keys; None
        while there are no such two, and once the newest is old: then the model has changed more
        than its budget.
        """
        *earlier, now = self._phases.get(place, [[]])
        if not self.patience <= self._measured.get(place, 0) <= self.most:
            return None
        for phase in reversed(earlier):
            if len(phase) >= self.patience and _mean(now, 0) >= GROWTH * _mean(phase, 0):
                return phase, now
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"phases": self._phases, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._phases, self._measured = state_dict["phases"], state_dict["measured"]


class PersistentError:
    """Layers whose output error stays although the budget grows, at equal contexts.

    Dropped mass may stay where it is (it need not fall for any C < 1), the output's error must
    fall: like keys^-1/2 for values independent of the scores (reconstructed; arXiv 2404.02690
    claims decreasing loss). A layer is reported when its error is above the limit and above what
    keys^-FALL allows by two standard errors, those of its measurements.

    Args:
        limit: relative output error below which nothing is reported.
        patience: measurements that a budget must have before and after, at least 2.
    """

    def __init__(self, limit: float, patience: int) -> None:
        self.limit = limit
        self.phases = Phases(patience)

    def add(self, sample: Sample) -> list[Place]:
        """Add a measurement; the layers to report now, with their error."""
        places = []
        for layer, rows in sample.layers.items():
            bucket = log2_bucket(rows.context)
            error, keys = rows.output_error.nanmean(1), sample.budgets[layer].double().log()
            pairs = []
            for n in bucket.unique().tolist():
                chosen = bucket == n
                if chosen.sum() < _LEAST_ROWS:
                    continue
                name = f"{layer}/{n}"
                self.phases.add(name, float(keys[chosen].mean().exp()), float(error[chosen].mean()))
                pairs += [pair for pair in [self.phases.before_and_now(name)] if pair]
            if pairs and self._persists(pairs):
                places.append(Place(layer, None, fmean(_mean(now, 1) for _, now in pairs)))
        return places

    def _persists(self, pairs: list[tuple[Phase, Phase]]) -> bool:
        excess = noise = 0.0
        for before, now in pairs:
            share = (_mean(now, 0) / _mean(before, 0)) ** -FALL
            excess += _mean(now, 1) - share * _mean(before, 1)
            noise += _squared_error(now) + share**2 * _squared_error(before)
        above = fmean(_mean(now, 1) for _, now in pairs) > self.limit
        return above and excess > STANDARD_ERRORS["persistent_error"] * math.sqrt(noise)


class PersistentGap:
    """The same for the whole model: KL at equal contexts that more keys did not lower.

    Args:
        limit: KL in nats a token below which nothing is reported.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        # Each comparison is an average over thousands of tokens already.
        self.phases = Phases(patience=1)

    def add(self, gap: Gap, keys: Mapping[int, float]) -> float | None:
        """Add a comparison and the keys that the law gives its contexts; the KL to report."""
        pairs = []
        for n, kl in gap.by_context(_LEAST_TOKENS).items():
            self.phases.add(str(n), keys[n], kl)
            pairs += [pair for pair in [self.phases.before_and_now(str(n))] if pair]
        if not pairs:
            return None
        before, now = (fmean(phase[-1][1] for phase in side) for side in zip(*pairs, strict=True))
        return now if now > self.limit and now >= before else None


class GrowingGap:
    """KL that grows with ln n over the documents of one comparison, twice in a row.

    Args:
        limit: KL in nats a token of the longest contexts below which nothing is reported.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._in_a_row = 0

    def add(self, gap: Gap) -> float | None:
        """Add a comparison; the KL of its longest contexts if it is to be reported."""
        by_context = gap.by_context(_LEAST_TOKENS)
        slope, error = slope_by_document(gap.documents)
        grows = slope > STANDARD_ERRORS["gap_grows_with_length"] * error
        longest = by_context[max(by_context)] if len(by_context) > 1 else 0.0
        self._in_a_row = self._in_a_row + 1 if grows and longest > self.limit else 0
        return longest if self._in_a_row >= 2 else None

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_a_row = state_dict["in_a_row"]


def slope_by_document(documents: Tensor) -> tuple[float, float]:
    """Least-squares slope of the KL on ln n over all tokens, nats per e-fold, and its standard
    error, clustered by document: the tokens of one depend on each other. See `Gap.documents`.

    The error is infinite for fewer documents than an error can be told from.
    """
    count, x, xx, y, xy = documents.unbind(1)
    total = count.sum()
    mean_x, mean_y = x.sum() / total, y.sum() / total
    spread = xx.sum() - total * mean_x**2
    if len(documents) < _LEAST_DOCUMENTS or spread <= 1e-9 * total:
        return 0.0, math.inf
    slope = (xy.sum() - total * mean_x * mean_y) / spread
    # Each document's part of the normal equation, sum of (x - mean_x) * residual.
    inner = xy - mean_x * y - mean_y * (x - count * mean_x)
    inner = inner - slope * (xx - 2 * mean_x * x + count * mean_x**2)
    correction = len(documents) / (len(documents) - 1)
    error = torch.sqrt(correction * inner.square().sum()) / spread
    return float(slope), float(error)


def _mean(phase: Phase, column: int) -> float:
    return fmean(entry[column] for entry in phase)


def _squared_error(phase: Phase) -> float:
    """Of the mean value."""
    return variance(entry[1] for entry in phase) / len(phase)
