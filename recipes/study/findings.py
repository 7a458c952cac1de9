"""What a study is asked, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How a study runs.

    Args:
        out: directory of its report; it exists.
        work: directory for what is made on the way and used again (trained models).
        quick: the form that takes less than 2 minutes on two cores, for a look and for tests.
        large: the form of `training` for a GPU.
        seed: of everything that is drawn.
        models: Hugging Face directories, of studies that take some; empty: the study's own.
        progress: told what is done next.
    """

    out: Path
    work: Path
    quick: bool = False
    large: bool = False
    seed: int = 0
    models: Sequence[Path] = ()
    progress: Callable[[str], None] = lambda text: None


class Outcome(str, Enum):
    """What a study says of a claim."""

    SUPPORTED = "supported"
    LIMITED = "supported with a limit"
    NOT_HERE = "not supported here"

    @classmethod
    def of(cls, supported: bool, limited: bool) -> Outcome:
        """By two conditions, of which the first counts first."""
        if supported:
            return cls.SUPPORTED
        return cls.LIMITED if limited else cls.NOT_HERE


@dataclass(frozen=True)
class Verdict:
    """A claim, and what the numbers say of it.

    Args:
        claim: one sentence.
        outcome: computed from the numbers, never written down beforehand.
        numbers: the measured ones that decide, with units and spread.
        limit: where the claim ends; empty where the outcome is `SUPPORTED`.
    """

    claim: str
    outcome: Outcome
    numbers: str
    limit: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that become NAME.csv, and a table of the report.

    Args:
        name: stem of the file.
        title: a line above it; the units are in the column names.
        columns: names.
        rows: strings, numbers, None for nothing.
        shown: columns of the report, where the CSV has more; None: all.
        in_report: whether the report shows it, or only names the file (long ones).
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shown: Sequence[str] | None = None
    in_report: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure that becomes NAME.png.

    Args:
        name: stem of the file.
        title: a line of the report under it: what is seen.
        draw: draws on an empty matplotlib figure.
        size: in inches.
    """

    name: str
    title: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (10, 4)


@dataclass(frozen=True)
class Findings:
    """All of a study: what its report is made of.

    Args:
        question: what was asked, a sentence or two.
        method: what was done, a paragraph; sizes, lengths, repetitions.
        verdicts: one for each claim it is about.
        tables, charts: in the order of the report.
        notes: what a reader has to know besides: limits, surprises.
        seeds: all that were used.
    """

    question: str
    method: str
    verdicts: Sequence[Verdict]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    notes: Sequence[str] = field(default_factory=tuple)
    seeds: Sequence[int] = (0,)
