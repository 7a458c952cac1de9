"""Sparsity by depth: how many keys each layer and head of a trained model needs, and how that grows
with the context, against the same architecture with random weights and against random tokens.

Whether n^C-sparsity survives layers with residuals and normalisation is an open question of arXiv
2404.02690, whose theory is about one layer of independent bounded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.study import subjects
from lit_sparse.recipes.study.findings import Findings, Settings
from lit_sparse.recipes.study.layers import figures, tables
from lit_sparse.recipes.study.layers.depth import Depth, fit
from lit_sparse.recipes.study.layers.measure import LOCAL, SINK, measure
from lit_sparse.recipes.study.layers.verdicts import verdicts
from lit_sparse.recipes.study.subjects import Subject

SHORTEST, LONGEST = 64, 4096
"""Tokens of the texts, whatever the model's context is."""

_ROWS = 8


def run(settings: Settings) -> Findings:
    """See the package."""
    found = [d for path in subjects.given(settings) for d in _of_model(settings, path)]
    count = _texts_of_a_length(settings)
    return Findings(
        question="Does a row of attention need n^C keys, C < 1, at every depth of a model with "
        "several layers, residuals and normalisation, and does C change with depth (open question "
        "1 of arXiv 2404.02690)?",
        method=f"Each model ran densely on {count} texts of each length (the lengths are in "
        f"keys.csv), different ones at each; {_ROWS} rows of the last quarter of a text were "
        "looked at in every layer and head. k_eps is the fewest keys that have all but the share "
        "eps of a row's mass, of all keys it sees, and of the far ones alone: without the first "
        f"{SINK} and the nearest {LOCAL} tokens, renormalised. k = alpha n^C is the quantile "
        "regression of `lit-sparse calibrate` (enough for 90 % of the rows; intervals from a "
        "bootstrap over texts), the forms are compared by BIC. Controls: tokens drawn evenly; the "
        "same architecture with random weights; and, fitted in the same way, independent Gaussian "
        "logits that have in every row the standard deviation that was measured.",
        verdicts=verdicts(found, settings.seed),
        tables=tables.all_of(found, settings.seed),
        charts=figures.all_of(found),
        notes=_notes(found),
        seeds=(settings.seed,),
    )


def lengths(context: int, quick: bool = False) -> list[int]:
    """Those of the texts, for a model whose positions reach `context` tokens: over a factor 8, or
    less where that would be shorter than SHORTEST.
    """
    longest = min(context, LONGEST)
    sixteenths = (2, 4, 8, 16) if quick else (2, 3, 4, 6, 8, 12, 16)
    return [length for part in sixteenths if (length := longest * part // 16) >= SHORTEST]


def _of_model(settings: Settings, path: Path) -> Iterator[Depth]:
    own = subjects.trained(path)
    if own.context < 4 * SHORTEST:
        raise BadArgument(
            f"MODEL {path} has positions for {own.context} tokens; a law is fitted to contexts "
            f"from {SHORTEST} tokens to four times as many"
        )
    random = subjects.untrained(path, settings.seed)
    for subject, kind in ((own, "source"), (own, "random tokens"), (random, "source")):
        settings.progress(f"{subject.name}, {subject.weights} weights, {subjects.KINDS[kind]}")
        yield _look(settings, subject, kind)


def _look(settings: Settings, subject: Subject, kind: str) -> Depth:
    count = _texts_of_a_length(settings)
    wanted = dict.fromkeys(lengths(subject.context, settings.quick), count)
    texts = subjects.read(kind, subject, wanted, settings.seed)
    measured = measure(subject, kind, texts, _ROWS, settings.seed)
    return fit(measured, 50 if settings.quick else 200, settings.seed)


def _texts_of_a_length(settings: Settings) -> int:
    return 8 if settings.quick else 32


def _notes(found: list[Depth]) -> list[str]:
    shortest, longest = found[0].main.shortest, max(depth.main.longest for depth in found)
    return [
        f"Contexts of {shortest} to {longest} tokens: no word about longer ones. So few keys make "
        "C smaller than it is in the limit, which the Gaussian control shows.",
        subjects.SEEN,
        "A slope of exp(H), the entropy's number of keys, is a second view of C without an eps.",
    ]
