"""A study's directory: report.md, its tables as CSV, its figures as PNG, verdicts.json."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_sparse.recipes.benchmark.report import environment, write_json
from lit_sparse.recipes.study.findings import Chart, Findings, Settings, Table

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart."""

_VERSIONS = ("torch", "transformers", "pytorch-lightning", "lit-sparse")


def write(
    title: str, findings: Findings, settings: Settings, command: str, seconds: float
) -> list[str]:
    """Write all files into `settings.out`.

    Args:
        title: of the report.
        command: that ran.
        seconds: that it took.

    Returns:
        the report's lines.
    """
    machine = {
        **environment(command),
        "seconds": round(seconds),
        "seeds": list(findings.seeds),
        "quick": settings.quick,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    for table in findings.tables:
        _write_csv(settings.out / f"{table.name}.csv", table)
    for chart in findings.charts:
        _write_png(settings.out / f"{chart.name}.png", chart)
    verdicts = [asdict(verdict) for verdict in findings.verdicts]
    write_json(settings.out / "verdicts.json", {"machine": machine, "verdicts": verdicts})
    lines = _lines(title, findings, machine)
    (settings.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def cell(value: Any) -> str:
    """A number to four significant digits, "-" for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; columns that hold numbers stand flush right."""
    cells = [[cell(value) for value in row] for row in rows]
    numeric = [
        all(isinstance(row[i], (int, float)) or row[i] is None for row in rows)
        for i in range(len(columns))
    ]
    rule = ["---:" if right else "---" for right in numeric]
    # A bar, as in ||W||, would end the cell.
    lines = [[text.replace("|", r"\|") for text in line] for line in (columns, rule, *cells)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _lines(title: str, findings: Findings, machine: dict[str, Any]) -> list[str]:
    lines = [f"# {title}", "", findings.question, "", "## Verdicts", ""]
    rows = [(v.claim, v.outcome.value, v.numbers, v.limit or "-") for v in findings.verdicts]
    lines += markdown(("claim", "outcome", "numbers", "limit"), rows)
    lines += ["", "## What was done", "", findings.method, ""]
    if findings.charts:
        lines += ["## Figures", ""]
    for chart in findings.charts:
        lines += [f"![{chart.title}]({chart.name}.png)", "", chart.title, ""]
    lines += ["## Numbers", ""]
    for table in findings.tables:
        lines += [f"**{table.title}** ([{table.name}.csv]({table.name}.csv))", ""]
        if table.in_report:
            shown = list(table.shown or table.columns)
            places = [list(table.columns).index(name) for name in shown]
            lines += [*markdown(shown, [[row[i] for i in places] for row in table.rows]), ""]
    if findings.notes:
        lines += ["## To know", "", *(f"- {note}" for note in findings.notes), ""]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [
        *lines,
        "## Run",
        "",
        f"- command: `{machine['command']}`",
        f"- machine: {machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores",
        f"- time: {machine['seconds']} s",
        f"- seeds: {', '.join(map(str, machine['seeds']))}",
        f"- versions: {versions}, Python {machine['python']}",
    ]


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)


def _write_png(path: Path, chart: Chart) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=chart.size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    chart.draw(figure)
    figure.savefig(path)
