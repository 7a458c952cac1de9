"""The study's quick form says what the theory says, where it is known."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from reports import outcomes, rows, run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return run("norms", tmp_path_factory.mktemp("norms"))


def test_the_report_is_there(out):
    report = (out / "report.md").read_text()
    for name in ("phases", "gammas", "growths"):
        assert (out / f"{name}.png").stat().st_size > 10000
        assert f"({name}.png)" in report


def test_verdicts(out):
    assert outcomes(out) == ["supported with a limit"] * 4


def test_the_exponent_falls_with_gamma(out):
    found = {float(row["gamma"]): row for row in rows(out, "temperatures")}
    for gamma, row in found.items():
        if gamma <= 0.5:
            assert float(row["C"]) == pytest.approx(1 - gamma, abs=0.06)
            assert float(row["gamma of entropy"]) == pytest.approx(gamma, abs=0.08)
        if gamma >= 2:
            assert abs(float(row["C"])) < 0.15
            # Poisson-Dirichlet weights, the limit of many keys.
            limit = float(row["its limit 1 - gamma^-1/2"])
            assert float(row["sum p^2"]) == pytest.approx(limit, abs=0.15)


def test_gamma_1_lies_between_a_few_keys_and_one(out):
    thresholds = rows(out, "thresholds")
    few = [float(row["gamma, 16 keys"]) for row in thresholds]
    assert few == sorted(few)
    for row, gamma in zip(thresholds, few, strict=True):
        assert gamma < float(row["1 - ln 16 / ln n"]) < 1 < float(row["gamma, one key"])


def test_norms_that_outgrow_the_root_of_the_logarithm_end_the_growth_of_the_support(out):
    found = {row["R"]: float(row["C"]) for row in rows(out, "growths")}
    assert found["R = sqrt(ln n)"] == pytest.approx(0.5, abs=0.1)
    assert found["R = 0.5 ln n"] < 0.1
    assert found["R = 0.5 n^0.25"] < -0.3


def test_the_bound_on_logits_holds(out):
    for row in rows(out, "bounds"):
        assert float(row["share above M of R_i"]) <= 0.05
        assert float(row["M of R_i"]) < (1.6 if row["entries"] == "-1 or 1" else 3)
        assert float(row["std"]) == pytest.approx(1 if row["entries"] == "-1 or 1" else 1 / 3, 0.1)
