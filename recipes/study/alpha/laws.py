"""The laws that are held against each other: calibrated ones, a grid, the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_sparse.budget import PRESETS, Budget
from lit_sparse.calibration import ChosenLaw, choose_law, fit_heads
from lit_sparse.data import Documents
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.calibrate.check import raised, run_check
from lit_sparse.recipes.calibrate.measure import Subject, load, longest_context, measure
from lit_sparse.recipes.calibrate.texts import choose_texts, open_documents
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.reading import BLOCK, LOCAL, LONGEST, SINK, TILE

REFERENCE, FACTORS = 32768, (1, 2, 4, 8)
"""Context at which a preset's share of the keys is taken over to the longest one here, and what
that is multiplied by: what counts is the exponent, at any number of keys."""

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""The grid: C, and keys of the longest context."""

MISSED = (0.8, 0.6, 0.4, 0.2, 0.1, 0.05)
"""Shares of the attention mass that calibrated laws may miss; the last is the default's."""


@dataclass(frozen=True)
class Candidate:
    """A law.

    Args:
        kind: "calibrated", "grid" or "preset".
        name: of tables.
        chosen: its budget, and those of single layers.
        preset: the name of the one that it is a multiple of.
    """

    kind: str
    name: str
    chosen: ChosenLaw
    preset: str = ""

    @property
    def exponent(self) -> float:
        return self.chosen.budget.exponent


def open_subject(settings: Settings, path: Path) -> tuple[Subject, int]:
    """A model with the documents that it is calibrated on, and the longest context that is used.

    Raises:
        BadArgument: it cannot be used, or there are too few documents.
    """
    try:
        model, selecting = load(path, "float32", "cpu", BLOCK, TILE, SINK)
    except BadArgument as error:
        # Here it is no option.
        raise BadArgument(str(error).replace("--model", "MODEL", 1)) from error
    context = min(longest_context(model), LONGEST)
    lengths = [context // 8, context // 4, context // 2]
    vocabulary = model.get_input_embeddings().num_embeddings
    documents, tokenizer = open_documents(path, "stdlib", vocabulary)
    count, checked = (8, 2) if settings.quick else (32, 8)
    texts = choose_texts(documents, lengths, count, checked, settings.seed)
    return Subject(path, model, selecting, texts, tokenizer), context


def other_documents(subject: Subject) -> Documents:
    """Those that no calibration reads."""
    texts = subject.texts
    read = np.concatenate([*texts.fitted.values(), texts.held_out])
    numbers = np.setdiff1d(np.arange(len(texts.documents)), read)
    return Documents(texts.documents.store, texts.documents.numbers[numbers])


def calibrated(
    settings: Settings, subject: Subject, context: int
) -> tuple[list[Candidate], list[str]]:
    """What `lit-sparse calibrate` finds for several targets, its check included; and the targets
    that leave every layer dense, which give no law.
    """
    rows, steps = (4, 3) if settings.quick else (8, 6)
    found, dense = [], []
    for missed in MISSED[:3:2] if settings.quick else MISSED:
        target = f"{1 - missed:.0%} of the mass"
        settings.progress(f"{subject.path}: calibrated for {target}")
        needs = measure(subject, missed, rows, settings.seed, _silent)
        fits = fit_heads(needs, seed=settings.seed)
        late = subject.selecting.budget.late
        law = choose_law(fits, sink=SINK, local=LOCAL, late=late, block=BLOCK)
        if law.dense:
            dense.append(target)
            continue
        check = run_check(subject, law, context, missed, steps, 0, settings.seed, _silent)
        found.append(Candidate("calibrated", target, raised(law, check.factor)))
    return found, dense


def grid(settings: Settings, context: int) -> list[Candidate]:
    """Every C through every share of the longest context."""
    every = 2 if settings.quick else 1
    return [
        Candidate(
            "grid",
            f"C {exponent:g}, {share:.3g} of {context}",
            ChosenLaw(_through(share, context, exponent)),
        )
        for exponent in EXPONENTS[::every]
        for share in SHARES[::every]
    ]


def presets(context: int) -> list[Candidate]:
    """The presets' exponents, through multiples of the share of the keys that they keep at
    `REFERENCE`, without their floor of 1024 keys: at the contexts here they would keep everything.
    """
    found = []
    for name, law in PRESETS.items():
        share = Budget.preset(name)(REFERENCE) / REFERENCE
        for factor in FACTORS:
            if factor * share > 1:
                continue
            budget = _through(factor * share, context, law["exponent"])
            found.append(Candidate("preset", f"{name} x {factor}", ChosenLaw(budget), name))
    return found


def _through(share: float, context: int, exponent: float) -> Budget:
    return Budget.through(share * context, context, exponent, floor=0, sink=SINK, local=LOCAL)


def _silent(text: str) -> None:
    """Calibration tells of every document."""
