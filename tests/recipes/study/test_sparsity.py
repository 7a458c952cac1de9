"""The study's quick form says what the theory says, where it is known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_sparse.recipes.study.findings import Outcome
from lit_sparse.recipes.study.sparsity.measure import (
    BUDGETS,
    GROWTHS,
    LOSS_GROWTHS,
    NORMS,
    WORST,
    WORST_BUDGETS,
    Measured,
    worst_of_rows,
)
from lit_sparse.recipes.study.sparsity.verdicts import verdicts

sys.path.append(str(Path(__file__).parent))
from reports import outcomes, rows, run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return run("sparsity", tmp_path_factory.mktemp("sparsity"))


def test_the_report_is_there(out):
    report = (out / "report.md").read_text()
    for name in ("keys", "losses", "worst_rows"):
        assert (out / f"{name}.png").stat().st_size > 10000
        assert f"({name}.png)" in report


def test_verdicts(out):
    limited = "supported with a limit"
    assert outcomes(out) == [limited, "supported", "not supported here", limited, limited]


def test_the_exponent_is_1_at_a_fixed_norm_and_1_minus_gamma_on_the_way_to_collapse(out):
    found = {row["R"]: row for row in rows(out, "exponents")}
    assert float(found["R = 1"]["C of k_eps"]) == pytest.approx(1, abs=0.02)
    for row in found.values():
        # At R = 4 these lengths are near the collapse, where the leading order is far off.
        if row["R"] not in ("R = 4", "R = sqrt(1.5 ln n)"):
            expected = float(row["C of Gaussian logits"])
            assert float(row["C of k_eps"]) == pytest.approx(expected, abs=0.04)
    for radius, gamma in (("R = sqrt(0.5 ln n)", 0.25), ("R = sqrt(ln n)", 0.5)):
        assert float(found[radius]["C of exp(entropy)"]) == pytest.approx(1 - gamma, abs=0.1)


def test_the_norm_decides_which_loss_falls(out):
    slopes = {
        (row["norm"], row["k"]): float(row["slope"])
        for row in rows(out, "losses")
        if row["R"] == "R = 1"
    }
    for k, C in (("n^.25", 0.25), ("n^.5", 0.5), ("n^.75", 0.75)):
        assert slopes["largest dropped weight", k] < -C
        assert slopes["dropped mass", k] > 0
        assert slopes["output, independent values", k] == pytest.approx(-C / 2, abs=0.12)
        assert slopes["output, linear values", k] > slopes["output, independent values", k]
    assert abs(slopes["output, independent values", "log2 n"]) < 0.08


def test_the_worst_of_n_rows_keeps_its_error_with_log_n_keys(out):
    found = {row["k"]: row for row in rows(out, "worst_rows")}
    assert float(found[".5 log2 n"]["n = 16384"]) == 1
    assert float(found["n^.5"]["n = 16384"]) < 0.5


def test_the_worst_row_by_hand():
    """Of 4096 rows some have all signs of 3 equal keys alike, and all have those of 1."""
    generator = torch.Generator().manual_seed(0)
    assert worst_of_rows(torch.full((3,), 0.1), 4096, generator) == 1
    assert worst_of_rows(torch.tensor([0.6, 0.2]), 1, generator) in (1.0, 0.5)


@pytest.mark.parametrize(
    ("power", "loss", "outcome"),
    [(0.5, -0.9, Outcome.SUPPORTED), (1.0, 0.1, Outcome.NOT_HERE)],
)
def test_verdicts_follow_the_numbers(power, loss, outcome):
    """Exact power laws: everything falls, and few keys are needed; or nothing, and all are."""
    n = np.array([[1024.0, 4096.0, 16384.0]] * 3)
    keys = {(what, g.name): n**power for what in ("keys", "support") for g in GROWTHS}
    losses = {
        (norm, g.name, k): 0.1 * n**loss for norm in NORMS for g in LOSS_GROWTHS for k in BUDGETS
    }
    worst = {(WORST, LOSS_GROWTHS[0].name, k): n**loss for k in WORST_BUDGETS}
    measured = Measured([1024, 4096, 16384], 3, 1, {**keys, **losses, **worst})
    # With an error that falls for log n keys too, these are not infeasible.
    expected = [outcome] * 4 + [Outcome.NOT_HERE]
    assert [verdict.outcome for verdict in verdicts(measured)] == expected
