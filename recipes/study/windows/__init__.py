"""Study `windows`: constant, logarithmic, alpha n^C and proportional windows at equal cost."""

from __future__ import annotations

from collections.abc import Sequence

from lit_sparse.recipes.study.findings import Findings, Settings
from lit_sparse.recipes.study.reading import BLOCK, LOCAL, SINK
from lit_sparse.recipes.study.subjects import SEEN, given
from lit_sparse.recipes.study.windows import persistence, synthetic, trained
from lit_sparse.recipes.study.windows.cost import RULES
from lit_sparse.recipes.study.windows.figures import growth_chart, synthetic_charts, trained_charts
from lit_sparse.recipes.study.windows.persistence import Growth
from lit_sparse.recipes.study.windows.synthetic import Errors
from lit_sparse.recipes.study.windows.tables import growth_table, synthetic_tables, trained_tables
from lit_sparse.recipes.study.windows.trained import Trained
from lit_sparse.recipes.study.windows.verdicts import all_verdicts


def run(settings: Settings) -> Findings:
    """Synthetic rows, slow windows, and trained models on rows that mix document lengths."""
    seed = settings.seed
    # Models first: what is wrong with one is said at once.
    models = [trained.measure(settings, path) for path in given(settings)]
    rows, growth = synthetic.measure(settings), persistence.measure(settings)
    return Findings(
        question="Is a window that adapts to the context, k(n) = alpha n^C, better than a constant "
        "one where document lengths differ, if both cost the same? And does the error of a window "
        "of o(log n) keys stay?",
        method=_method(rows, growth, models),
        verdicts=all_verdicts(rows, growth, models, seed),
        tables=[
            *trained_tables(models, seed),
            *synthetic_tables(rows, seed),
            growth_table(growth),
        ],
        charts=[*synthetic_charts(rows), growth_chart(growth), *trained_charts(models)],
        notes=_NOTES,
        seeds=(seed,),
    )


_NOTES = (
    "Equal mean cost moves keys from short documents to long ones: at short lengths a constant "
    "window has more keys than an adaptive one and errs less there, at long lengths fewer. Which "
    "is better depends on how lengths are weighed, so both readings are given.",
    "For the mean of lengths the best exponent lies below that of the need. One key more is a "
    "share 1/n of a row's keys, so it is worth most where n is small; where the error is a "
    "function of k alone, as k^-1/2, a constant window has the least mean (Jensen).",
    "A window of o(log n) keys cannot be told here from one whose error falls as a small power of "
    "ln n.",
    SEEN,
)


def _method(rows: Errors, growth: Growth, models: Sequence[Trained]) -> str:
    names = ", ".join(rule.name for rule in RULES)
    model = models[0]
    return (
        f"Windows: {names}. The mixture of lengths has equally many tokens at every doubling; each "
        "window's scale is solved so that the mean of its keys over all query positions of the "
        "mixture is that of the constant one. A worst length is the one with the largest mean "
        "error. Intervals are a bootstrap over rows, which all windows share.\n\n"
        f"Synthetic: documents of {rows.lengths[0]} to {rows.lengths[-1]} tokens, "
        f"{rows.values.shape[-1]} rows at each length, spread over its positions; tokens of "
        "independent entries -1 or 1, values that do not depend on the scores; the largest k keys "
        "are kept. sigma is the standard deviation of the logits, fixed, or with "
        "gamma = sigma^2 / (2 ln n) fixed. Windows that grow slowly: from "
        f"{persistence.KEYS} keys of {persistence.SHORTEST}, to {growth.contexts[-1]} (the "
        f"largest error of n rows over the same keys: to {growth.all_contexts[-1]}).\n\n"
        f"Trained: {', '.join(m.name for m in models)}; {model.values.shape[-1]} packed rows of "
        f"documents of {model.lengths[0]} to {model.lengths[-1]} tokens, pieces of Python's own "
        f"source; the operator with blocks and tiles of {BLOCK} tokens, sink "
        f"{SINK}, {LOCAL:.0%} of each window local. Costs are keys that the operator reads, "
        "solved from lengths and measured. Contexts are short, so blocks are: with blocks of 64 "
        "most windows would keep most of a document."
    )
