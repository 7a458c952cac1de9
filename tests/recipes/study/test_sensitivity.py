"""The study's quick form: predictions hold under the assumptions, and break where they must."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from reports import outcomes, rows, run

from lit_sparse.recipes.study.sensitivity.verdicts import breaks
from lit_sparse.recipes.study.stats import Estimate


@pytest.mark.parametrize(
    ("ratio", "broken"),
    [((1.2, 1.1, 1.3), False), ((1.3, 1.1, 1.5), True), ((0.5, -1, 2), False), ((0, 0, 0), True)],
)
def test_a_prediction_breaks_where_it_is_far_off_for_sure(ratio, broken):
    assert breaks(Estimate(*ratio)) == broken


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return run("sensitivity", tmp_path_factory.mktemp("sensitivity"))


@pytest.mark.slow
def test_verdicts(out):
    limited = "supported with a limit"
    assert outcomes(out) == ["supported", limited, limited]
    assert (out / "degradation.png").stat().st_size > 10000


@pytest.mark.slow
def test_what_breaks(out):
    broken = {(row["relaxed"], row["level"]): row["broken"] for row in rows(out, "degradation")}
    assert broken["none", "-1 or 1"] == broken["bounded entries", "uniform"] == "none"
    # The mean of all keys is not seen by a softmax; a correlation over positions leaves the
    # distribution of logits as it is; heavy tails do not.
    for family, level in broken:
        if family.startswith(("shared mean", "correlated")):
            assert not {"k_eps", "C"} & set(broken[family, level].split(", "))
    assert "output error" in broken["correlated neighbours, rho", "0.99"]
    assert "k_eps" in broken["heavy tails, df", "3"]
    assert "collapse gamma" in broken["outlier features, scale", "30x"]


@pytest.mark.slow
def test_the_radius_is_the_size_of_the_logits_of_signs_only(out):
    found = {
        row["level"]: float(row["measured / predicted"])
        for row in rows(out, "ratios")
        if row["prediction"] == "R / sigma"
    }
    assert found["-1 or 1"] == pytest.approx(1, abs=0.1)
    assert found["uniform"] == pytest.approx(3, abs=0.3)
    assert found["3"] > 100
