"""The numbers of R, as tables: by layer, by head, correlations, under RoPE rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_sparse.recipes.study.entries import normal_largest
from lit_sparse.recipes.study.findings import Table
from lit_sparse.recipes.study.radius.measure import Radii
from lit_sparse.recipes.study.radius.rope import NONE, OWN, Rotated
from lit_sparse.recipes.study.radius.verdicts import (
    correlation_with_largest,
    correlation_with_share,
    correlation_with_spread,
)
from lit_sparse.recipes.study.stats import Estimate

WHO = ("model", "weights", "text", "length")

HEADS: dict[str, Callable[[Radii], Tensor]] = {
    "||W||_F": lambda r: r.weight,
    "||W||_F at distance 0": lambda r: torch.stack([x.weight[:, 0] for x in r.norms]),
    "R of RMS": lambda r: r.by_rms,
    "sigma": lambda r: r.spread,
    "R of largest": lambda r: r.by_largest,
    "estimate": lambda r: r.estimate,
    "bound": lambda r: r.bound,
    "largest logit": lambda r: r.largest,
    "k/n": lambda r: r.share,
}
"""Column -> numbers [L, H]."""


def all_of(found: Sequence[Radii], rotated: Sequence[Rotated], seed: int) -> list[Table]:
    return [
        Table(
            "layers",
            "By layer, medians over heads; logits in nats, estimate and bound are the largest "
            "logit that R predicts with the root mean square and with the largest entry for B",
            (*WHO, "layer", "RMS", "B", "B/RMS", "normal B/RMS", *HEADS),
            [row for radii in found for row in _layers(radii)],
            shown=(
                "model", "weights", "text", "layer", "RMS", "B/RMS", "R of RMS", "sigma",
                "R of largest", "estimate", "largest logit", "bound", "k/n",
            ),
        ),
        Table(
            "correlations",
            "Rank correlation over the heads of all layers, with 95 % intervals",
            (
                *WHO, *_interval("R of RMS, sigma"), *_interval("R of RMS, k/n"),
                *_interval("R of largest, largest logit"),
            ),
            [_correlations(radii, seed) for radii in found],
        ),
        Table(
            "rope",
            "RoPE rules on Python source, without training: R over that without a rotation (mean "
            "over heads, least, most), medians of heads over those of the model's own rotation at "
            "its context",
            (
                "model", "rule", "length", "R/R none", "least", "most", "sigma/own", "sigma",
                "largest logit", "k/n", "loss",
            ),
            [row for one in rotated for row in _rope(one, rotated)],
        ),
        Table(
            "heads",
            "Every head",
            (*WHO, "layer", "head", *HEADS),
            [row for radii in found for row in _heads(radii)],
            in_report=False,
        ),
        Table(
            "distances",
            "||W_Q Rot W_K^T||_F / sqrt(d) by distance, every head",
            ("model", "rule", "layer", "head", "distance", "norm"),
            [row for one in rotated for row in _distances(one)],
            in_report=False,
        ),
    ]  # fmt: skip


def _who(radii: Radii) -> tuple[Any, ...]:
    return radii.subject.name, radii.subject.weights, radii.kind, radii.length


def _layers(radii: Radii) -> Iterator[tuple[Any, ...]]:
    columns = [of(radii).median(1).values for of in HEADS.values()]
    for place, (layer, x) in enumerate(zip(radii.subject.layers, radii.inputs, strict=True)):
        own = (float(column[place]) for column in columns)
        ratio, normal = x.largest_over_rms, normal_largest(x)
        yield (*_who(radii), layer, x.rms, x.largest, ratio, normal, *own)


def _heads(radii: Radii) -> Iterator[tuple[Any, ...]]:
    columns = [of(radii) for of in HEADS.values()]
    for place, layer in enumerate(radii.subject.layers):
        for head in range(radii.spread.shape[1]):
            own = (float(column[place, head]) for column in columns)
            yield (*_who(radii), layer, head, *own)


def _interval(name: str) -> tuple[str, str, str]:
    return name, f"{name}: low", f"{name}: high"


def _correlations(radii: Radii, seed: int) -> tuple[Any, ...]:
    found = (
        correlation_with_spread(radii, seed),
        correlation_with_share(radii, seed),
        correlation_with_largest(radii, seed),
    )
    return (*_who(radii), *(x for estimate in found for x in _numbers(estimate)))


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.mean, estimate.low, estimate.high


def _rope(one: Rotated, rotated: Sequence[Rotated]) -> Iterator[tuple[Any, ...]]:
    same = {r.rule: r for r in rotated if r.subject is one.subject}
    own = float(same[OWN].context.spread.median())
    for length, radii in one.radii.items():
        found: list[float | None] = [None] * 3
        if NONE in same:
            ratio = radii.weight / same[NONE].radii[length].weight
            found = [float(ratio.mean()), float(ratio.min()), float(ratio.max())]
        sigma = float(radii.spread.median())
        yield (
            one.subject.name, one.rule, length, *found, sigma / own, sigma,
            float(radii.largest.median()), float(radii.share.median()), radii.loss,
        )  # fmt: skip


def _distances(one: Rotated) -> Iterator[tuple[Any, ...]]:
    for place, layer in enumerate(one.subject.layers):
        for head, weights in enumerate(one.weight[place].tolist()):
            for distance, weight in zip(one.distances.tolist(), weights, strict=True):
                if distance & (distance - 1) == 0:
                    yield one.subject.name, one.rule, layer, head, distance, weight
