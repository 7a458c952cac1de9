"""How much a query row wants a key block: the pluggable part of the selection.

A scorer prepares a summary of the key blocks once, then scores rows against it. Scores are summed
over rows to choose a tile's base and compared within a row to choose its late blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RowScores = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""`(q [H, R, G, D], summary [H, N, ...], hidden bool [R, N], scale) -> scores [H, R, N]`, higher is
better. Blocks that are `hidden` from a row must not influence its scores; their own are ignored."""


@dataclass(frozen=True)
class Scorer:
    """Args:
    prepare: `blocks [H, N, block, D] -> summary [H, N, ...]`.
    rows: scores of query rows against the summary, see `RowScores`.
    """

    prepare: Callable[[Tensor], Tensor]
    rows: RowScores


def _logits(q: Tensor, summary: Tensor, scale: float) -> Tensor:
    heads, rows, group, dim = q.shape
    flat = (q * scale).reshape(heads, rows * group, dim)
    return torch.bmm(flat, summary.transpose(1, 2)).view(heads, rows, group, -1)


def _mass(logits: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the visible blocks, summed over the heads of the group; 0 where none is
    visible.
    """
    logits.masked_fill_(hidden[:, None, :], float("-inf"))
    # The ln(block) of the definition is the same for all complete blocks and cancels here.
    return logits.softmax(-1).sum(2)


def _mass_rows(q: Tensor, summary: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return _mass(_logits(q, summary, scale), hidden)


def _mean_rows(q: Tensor, summary: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return _logits(q, summary, scale).sum(2)


def _min_max(blocks: Tensor) -> Tensor:
    return torch.cat([blocks.amax(2), blocks.amin(2)], dim=-1)


def _min_max_rows(q: Tensor, summary: Tensor, hidden: Tensor, scale: float) -> Tensor:
    # max over the box of the block's keys of q . key: positive parts meet the maxima, negative the
    # minima.
    signed = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    return _mass(_logits(signed, summary, scale), hidden)


def _mean_and_variance(blocks: Tensor) -> Tensor:
    return torch.cat([blocks.mean(2), blocks.var(2, unbiased=False)], dim=-1)


def _variance_rows(q: Tensor, summary: Tensor, hidden: Tensor, scale: float) -> Tensor:
    # The log of the mean of e^s over a block's keys to second order, s = scale q . key, for keys
    # whose dimensions vary independently: E[s] + Var[s] / 2.
    features = torch.cat([q, q * q * (scale / 2)], dim=-1)
    return _mass(_logits(features, summary, scale), hidden)


def _exact_rows(q: Tensor, summary: Tensor, hidden: Tensor, scale: float) -> Tensor:
    heads, blocks, size, dim = summary.shape
    logits = _logits(q, summary.reshape(heads, blocks * size, dim), scale)
    return _mass(logits.unflatten(-1, (blocks, size)).logsumexp(-1), hidden)


SCORERS: dict[str, Scorer] = {
    # Softmax mass of the block's mean key: the definition (DESIGN, "The law and the selection").
    "mass": Scorer(lambda blocks: blocks.mean(2), _mass_rows),
    # Its logit, without a softmax: rows with large queries count for more.
    "mean": Scorer(lambda blocks: blocks.mean(2), _mean_rows),
    # The same with what the keys' spread adds: a block where one key is wanted and the others are
    # not has a low mean.
    "variance": Scorer(_mean_and_variance, _variance_rows),
    # Softmax mass of the largest logit that the block's bounding box allows (Quest, arXiv
    # 2406.10774).
    "minmax": Scorer(_min_max, _min_max_rows),
    # True softmax mass of the block, from every key: n x n work, a yardstick.
    "exact": Scorer(lambda blocks: blocks, _exact_rows),
}


def get_scorer(score: str | RowScores | Scorer) -> Scorer:
    """A scorer by name, or one around a function that takes the blocks [H, N, block, D]
    themselves.
    """
    if isinstance(score, Scorer):
        return score
    if callable(score):
        return Scorer(lambda blocks: blocks, score)
    if score not in SCORERS:
        raise ValueError(f"score must be one of {', '.join(SCORERS)} or a callable, got {score!r}")
    return SCORERS[score]
