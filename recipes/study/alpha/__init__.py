"""Study `alpha`: calibrated alpha and C against a grid and the presets, on text and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lit_sparse.recipes.study.alpha.figures import draw_losses
from lit_sparse.recipes.study.alpha.measure import Measured, measure
from lit_sparse.recipes.study.alpha.tables import distances_table, laws_table, losses_table
from lit_sparse.recipes.study.alpha.verdicts import against_presets, on_the_front
from lit_sparse.recipes.study.findings import Chart, Findings, Settings
from lit_sparse.recipes.study.reading import BLOCK, SINK
from lit_sparse.recipes.study.subjects import SEEN, given


def run(settings: Settings) -> Findings:
    """Calibrate, run all laws, see where the calibrated ones lie."""
    found = [measure(settings, path) for path in given(settings)]
    seed = settings.seed
    return Findings(
        question="Are the alpha and C that `lit-sparse calibrate` finds a good choice, among all "
        "alpha and C, and against the presets?",
        method=_method(found),
        verdicts=[*on_the_front(found, seed), against_presets(found, seed)],
        tables=[laws_table(found), distances_table(found, seed), losses_table(found)],
        charts=[_chart(measured, i) for i, measured in enumerate(found)],
        notes=_NOTES,
        seeds=(seed,),
    )


_NOTES = (
    "The front of a grid is the least of many measured losses, so chance makes it look better than "
    "it is: distances to it are, if anything, too large. Each bootstrap draw has its own front.",
    "A calibration looks at missed mass alone. It sees neither the loss nor the tasks, so it finds "
    "the front only as far as missed mass tells of them.",
    "A calibration accepts a law whose missed mass is within its target in 95 % of the rows, heads "
    "and layers, so a target is met by far more keys than a mean row needs.",
    "The presets keep at least 1024 keys, which is everything at these contexts. Here they have no "
    "floor, and their exponents go through 1, 2, 4 and 8 times the share of the keys that they "
    "keep at 32768 tokens.",
    SEEN,
)


def _method(found: Sequence[Measured]) -> str:
    parts = []
    for measured in found:
        kinds = ", ".join(
            f"{len(measured.of_kind(kind))} {what}"
            for kind, what in (
                ("calibrated", "calibrated laws"),
                ("grid", "of the grid"),
                ("preset", "presets"),
            )
        )
        tasks = "; ".join(
            f"{own.name} ({own.loss.shape[1]} rows, documents of "
            f"{', '.join(map(str, own.lengths))} tokens, dense loss {own.dense_loss:.3g}, "
            f"{own.dense_right:.0%} answered)"
            for own in measured.losses
        )
        parts.append(f"{measured.name}, context {measured.context}: {kinds}. {tasks}.")
    return (
        "A model is calibrated for several shares of the attention mass, as `lit-sparse calibrate` "
        "does it, on documents that no comparison reads; every law then runs on the same packed "
        f"rows, with blocks and tiles of {BLOCK} tokens and a sink of {SINK}. The loss of a task "
        "is that of its answer, given the right tokens before; all lengths count alike. Executed "
        "keys are measured. Intervals are a bootstrap over rows, which all laws share.\n\n"
        + "\n\n".join(parts)
    )


def _chart(measured: Measured, number: int) -> Chart:
    return Chart(
        "losses" if number == 0 else f"losses_{number + 1}",
        f"{measured.name}: loss difference against executed keys, of the grid (lines of one C), "
        "the calibrated laws and the presets.",
        partial(draw_losses, measured),
        (4 * len(measured.losses), 4.5),
    )
