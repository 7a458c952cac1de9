"""The numbers of sparsity by depth, as tables: by layer, by head, by length, of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lit_sparse.recipes.study.entries import normal_largest
from lit_sparse.recipes.study.findings import Table
from lit_sparse.recipes.study.layers.depth import Depth
from lit_sparse.recipes.study.stats import mean_of

WHO = ("model", "weights", "text", "layer")


def all_of(found: Sequence[Depth], seed: int) -> list[Table]:
    return [
        Table(
            "layers",
            "By layer, means over heads. C of all keys with eps .05 (95 % interval over heads), of "
            "the far keys, with eps .1, of exp(H), of Gaussian logits of the same spread; k/n and "
            "the masses at the longest texts or over all rows; heads whose C is below 1 for "
            "certain; which form is best by BIC",
            (
                *WHO, "C", "C low", "C high", "C far", "C eps .1", "C exp(H)", "C Gaussian",
                "k/n longest", "sink mass", "local mass", "heads", "C < 1", "far C < 1",
                "best form",
            ),
            [row for depth in found for row in _layers(depth, seed)],
        ),
        Table(
            "inputs",
            "What enters attention, by layer",
            (
                *WHO, "RMS", "largest/RMS", "normal largest/RMS", "excess kurtosis", "mean share",
                "token cosine", "effective dimensions/independent",
            ),
            [row for depth in found for row in _inputs(depth)],
        ),
        Table(
            "heads",
            "Every head's fit",
            (
                *WHO, "head", "view", "eps", "C", "C low", "C high", "C shrunk", "k_ref", "n_ref",
                "C exp(H)", "best form", "misfit BIC", "verdict", "sink mass", "local mass",
            ),
            [row for depth in found for row in _heads(depth)],
            in_report=False,
        ),
        Table(
            "keys",
            "Keys by length, mean and 90th percentile over rows",
            (*WHO, "head", "view", "eps", "length", "rows", "context", "mean", "p90"),
            [row for depth in found for row in _keys(depth)],
            in_report=False,
        ),
    ]  # fmt: skip


def _who(depth: Depth) -> tuple[str, str, str]:
    measured = depth.measured
    return measured.subject.name, measured.subject.weights, measured.kind


def _layers(depth: Depth, seed: int) -> Iterator[tuple[Any, ...]]:
    main, measured = depth.main, depth.measured
    columns = [
        depth.fits["far", 0.05].raw_exponent,
        depth.fits["all", 0.1].raw_exponent,
        main.support_exponent,
        depth.gaussian.raw_exponent,
        depth.share,
        measured.sink_mass.mean(0),
        measured.local_mass.mean(0),
    ]
    for place, layer in enumerate(main.layers):
        c = mean_of(main.raw_exponent[place], seed)
        forms = Counter(main.model[place]).most_common()
        yield (
            *_who(depth), layer, c.mean, c.low, c.high,
            *(float(column[place].mean()) for column in columns),
            main.exponent.shape[1],
            int(depth.sublinear()[place].sum()), int(depth.sublinear("far")[place].sum()),
            ", ".join(f"{form} {count}" for form, count in forms),
        )  # fmt: skip


def _inputs(depth: Depth) -> Iterator[tuple[Any, ...]]:
    for layer, x in depth.measured.inputs.items():
        yield (
            *_who(depth), layer, x.rms, x.largest_over_rms, normal_largest(x), x.excess_kurtosis,
            x.mean_share, x.token_cosine, x.dimension_share,
        )  # fmt: skip


def _heads(depth: Depth) -> Iterator[tuple[Any, ...]]:
    masses = [x.mean(0) for x in (depth.measured.sink_mass, depth.measured.local_mass)]
    for (view, missed), fits in depth.fits.items():
        numbers = [
            fits.raw_exponent, fits.exponent_low, fits.exponent_high, fits.exponent, fits.k_ref,
        ]  # fmt: skip
        for place, layer in enumerate(fits.layers):
            for head, form in enumerate(fits.model[place]):
                at = (place, head)
                yield (
                    *_who(depth), layer, head, view, missed, *(float(x[at]) for x in numbers),
                    fits.n_ref, float(fits.support_exponent[at]), form, float(fits.misfit[at]),
                    fits.verdict[place][head], *(float(mass[at]) for mass in masses),
                )  # fmt: skip


def _keys(depth: Depth) -> Iterator[tuple[Any, ...]]:
    for (view, missed), needs in depth.measured.needs.items():
        for length, rows in depth.measured.by_length().items():
            keys = needs.keys[rows].double()
            mean, p90 = keys.mean(0), torch.quantile(keys, 0.9, dim=0)
            context = float(needs.context[rows].double().mean())
            for place, layer in enumerate(needs.layers):
                for head in range(keys.shape[2]):
                    yield (
                        *_who(depth), layer, head, view, missed, length, len(keys), context,
                        float(mean[place, head]), float(p90[place, head]),
                    )  # fmt: skip
