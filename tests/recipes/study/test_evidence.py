"""The README's table of claims says what the committed reports say."""

import json
import re
from pathlib import Path

import pytest

from lit_sparse.recipes.study.command import STUDIES

ROOT = Path(__file__).parents[3]
REPORTS = ROOT / "recipes" / "study" / "reports"
LINK = re.compile(r"\[`(\w+)`\]\(recipes/study/reports/\1/report\.md\)")


def _verdicts(study: str) -> list[dict[str, str]]:
    return json.loads((REPORTS / study / "verdicts.json").read_text())["verdicts"]


def _rows() -> list[list[str]]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if LINK.search(line) and "|" in line]


@pytest.mark.parametrize("study", STUDIES)
def test_the_full_report_is_there_with_its_files(study):
    found = json.loads((REPORTS / study / "verdicts.json").read_text())
    machine = found["machine"]
    assert not machine["quick"]
    assert machine["command"].startswith(f"lit-sparse study {study}")
    assert {"cpu", "seconds", "seeds", "versions"} <= set(machine)
    report = (REPORTS / study / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"\(([\w.-]+\.(?:png|csv))\)", report):
        assert (REPORTS / study / name).is_file(), name


def test_every_study_has_a_row():
    assert {LINK.search(row[-1])[1] for row in _rows()} == set(STUDIES)


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0][:40])
def test_a_row_has_a_verdict_with_its_outcome_and_its_numbers(row):
    claim, outcome, numbers, link = row
    quoted = re.findall(r"\d+(?:\.\d+)?", numbers)
    assert quoted, "a row has a number"

    def says(verdict: dict[str, str]) -> bool:
        text = f"{verdict['claim']} {verdict['numbers']} {verdict['limit']}"
        there = set(re.findall(r"\d+(?:\.\d+)?", text))
        return verdict["outcome"] == outcome and set(quoted) <= there

    assert any(map(says, _verdicts(LINK.search(link)[1]))), claim
