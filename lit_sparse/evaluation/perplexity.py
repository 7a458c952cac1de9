"""The loss of a text by position: does more context still help, and does the sparse model follow?

The means over all positions of a long text say little: nearly all tokens are easy without the far
context. So losses are kept as sums over ranges of positions, from which every mean is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_sparse.models.head import language_head
from lit_sparse.training.loss import chunked_cross_entropy

FIRST_RANGE = 512
"""Positions of the first range, at most."""


def position_ranges(length: int, longest: int | None = None) -> list[int]:
    """Where the ranges of positions begin, and the end: 0, F, 2F, 4F, ..., length.

    Args:
        length: tokens of a text.
        longest: of the longest text that it is compared with; F is 512, less where that is shorter
            than 2048 tokens.
    """
    doublings = ((longest or length) - 1).bit_length()
    start = min(FIRST_RANGE, 2 ** max(doublings - 2, 0))
    ranges = [0]
    while start < length:
        ranges.append(start)
        start *= 2
    return [*ranges, length]


def late_start(length: int) -> int:
    """The first position of a text's last quarter: from there a token sees nearly all of it."""
    return 3 * length // 4


@dataclass(frozen=True)
class PositionLoss:
    """Losses of texts of one length, summed between edges.

    A token's position is the number of tokens before it; that at 0 is not predicted.
    """

    ranges: tuple[int, ...]
    """Where ranges of positions begin, and the end; see `position_ranges`."""
    edges: tuple[int, ...]
    """The same and where the last quarter begins: positions between which losses are summed."""
    nats: np.ndarray
    """float64 [texts, edges - 1], of the tokens between two edges."""

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.edges[-1]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First position and end of each range."""
        return list(pairwise(self.ranges))

    def of_texts(self, start: int = 0, end: int | None = None) -> np.ndarray:
        """Nats per token of each text at positions from one edge to another: float64 [texts]."""
        end = self.length if end is None else end
        first, last = self.edges.index(start), self.edges.index(end)
        return self.nats[:, first:last].sum(1) / (end - max(start, 1))

    @property
    def late(self) -> np.ndarray:
        """Nats per token of each text's last quarter: float64 [texts]."""
        return self.of_texts(late_start(self.length))


@torch.no_grad()
def position_loss(
    model: Any,
    texts: Tensor,
    ranges: Sequence[int],
    progress: Callable[[str], None] = lambda _: None,
) -> PositionLoss:
    """Run a causal language model on texts, each by itself.

    Args:
        model: a transformers model.
        texts: int64 [texts, length], length >= 2.
        ranges: see `position_ranges`; the last quarter is kept apart as well.
        progress: told which text is read.
    """
    head, length = language_head(model), texts.shape[1]
    edges = sorted({*ranges, late_start(length)})
    nats = np.zeros((len(texts), len(edges) - 1))
    for i, text in enumerate(texts.to(model.device)):
        progress(f"text {i + 1} of {len(texts)}, {length} tokens")
        # The base model: the logits of a long text never exist as a whole.
        (hidden,) = model.base_model(input_ids=text[None], use_cache=False)[0]
        for j, (start, end) in enumerate(pairwise(edges)):
            seen = slice(max(start, 1) - 1, end - 1)
            nats[i, j] = chunked_cross_entropy(hidden[seen], head, text[max(start, 1) : end])
    return PositionLoss(tuple(ranges), tuple(edges), nats)
