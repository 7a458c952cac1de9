"""What a study wrote, as tests read it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lit_sparse.recipes.study import main


def run(study: str, out: Path) -> Path:
    assert main([study, "--quick", "--out", str(out), "--work", str(out / "work")]) == 0
    return out


def outcomes(out: Path) -> list[str]:
    """In the order of the report."""
    found = json.loads((out / "verdicts.json").read_text())["verdicts"]
    assert all(verdict["numbers"] for verdict in found)
    assert all(bool(v["limit"]) == (v["outcome"] != "supported") for v in found)
    return [verdict["outcome"] for verdict in found]


def rows(out: Path, table: str) -> list[dict[str, str]]:
    with (out / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
