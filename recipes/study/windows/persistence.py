"""The error of windows that grow slowly, or not at all, as the context grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.inputs import D_MODEL, D_VALUE, rademacher
from lit_sparse.recipes.study.windows.synthetic import draw, errors

SHORTEST, KEYS, SIGMA = 256, 16, 1.0
"""The shortest context, what every window keeps of it, and the logits' standard deviation."""

_RATIOS: dict[str, Callable[[float], float]] = {
    "sqrt(log n)": lambda n: math.sqrt(math.log(n) / math.log(SHORTEST)),
    "log n": lambda n: math.log(n) / math.log(SHORTEST),
    "n^.25": lambda n: (n / SHORTEST) ** 0.25,
    "n^.5": lambda n: (n / SHORTEST) ** 0.5,
}
WINDOWS = tuple(_RATIOS)
"""The first is o(log n)."""


@dataclass(frozen=True)
class Growth:
    """Output errors ||o - o_S|| in root mean square norms of a value, renormalised.

    Args:
        contexts: of a row, in keys.
        one: of one row, [windows, repetitions, contexts].
        all_contexts: of what follows: the first of `contexts`.
        largest: of n rows over the same n keys, [windows, repetitions, all_contexts].
    """

    contexts: tuple[int, ...]
    one: np.ndarray
    all_contexts: tuple[int, ...]
    largest: np.ndarray


def measure(settings: Settings) -> Growth:
    """Errors of single rows, and the largest of n rows, at doubling contexts."""
    doublings, sets, rows, repetitions = (4, 4, 48, 4) if settings.quick else (9, 6, 128, 8)
    contexts = tuple(SHORTEST * 2**i for i in range(doublings))
    generator = torch.Generator().manual_seed(settings.seed + 1)
    one = np.empty((len(WINDOWS), repetitions, len(contexts)))
    largest = np.empty((len(WINDOWS), repetitions, min(sets, len(contexts))))
    for place, n in enumerate(contexts):
        settings.progress(f"windows that grow slowly, {n} keys")
        keys = [keys_of(name, n) for name in WINDOWS]
        for repetition in range(repetitions):
            # A repetition is a mean, so that it has a logarithm that means something.
            drawn = [
                errors(draw(n, generator), [SIGMA], keys)[1, 0] for _ in range(rows // repetitions)
            ]
            one[:, repetition, place] = torch.stack(drawn).mean(0)
            if place < largest.shape[2]:
                largest[:, repetition, place] = largest_error(n, keys, generator)
    return Growth(contexts, one, contexts[: largest.shape[2]], largest)


def keys_of(window: str, n: int) -> int:
    return math.ceil(KEYS * _RATIOS[window](n) - 1e-9)


def largest_error(n: int, keys: list[int], generator: torch.Generator) -> torch.Tensor:
    """The largest output error of n rows with queries of their own over the same n keys: [keys]."""
    tokens = rademacher(n, D_MODEL + D_VALUE, generator)
    x, values = tokens[:, :D_MODEL], tokens[:, D_MODEL:]
    found = torch.zeros(len(keys))
    for size in torch.arange(n).split(512):
        queries = torch.nn.functional.normalize(
            torch.randn(len(size), D_MODEL, generator=generator), dim=-1
        )
        p = (SIGMA * queries @ x.T).softmax(-1)
        dense = p @ values
        weights, best = p.topk(max(keys), dim=-1)
        sums = (weights[..., None] * values[best]).cumsum(1)
        kept = weights.cumsum(1)[..., None]
        for place, k in enumerate(keys):
            error = (dense - sums[:, k - 1] / kept[:, k - 1]).norm(dim=-1).max()
            found[place] = torch.maximum(found[place], error)
    return found / math.sqrt(D_VALUE)
