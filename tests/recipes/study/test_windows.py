"""Study `windows`: costs against brute force, what a verdict says where the answer is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_sparse.attention import select
from lit_sparse.budget import Budget
from lit_sparse.recipes.study.findings import Outcome
from lit_sparse.recipes.study.reading import mixture
from lit_sparse.recipes.study.windows.compare import compare, keys_ratio
from lit_sparse.recipes.study.windows.cost import (
    ADAPTIVE,
    CONSTANT,
    RULES,
    executed_keys,
    mean_keys,
    solve,
)
from lit_sparse.recipes.study.windows.synthetic import NORMS, REGIMES, Errors, draw, errors
from lit_sparse.recipes.study.windows.verdicts import best_exponent, on_synthetic_rows

sys.path.append(str(Path(__file__).parent))
from reports import outcomes, rows, run

DOCUMENTS = (40, 7, 130, 40, 64)


def test_a_mixture_has_as_many_tokens_at_every_length():
    assert mixture(64, 512) == (64,) * 8 + (128,) * 4 + (256,) * 2 + (512,)


def test_mean_keys_counts_every_query_once():
    budget = Budget(3.3, 0.5, floor=5)
    each = [budget(n) for length in DOCUMENTS for n in range(1, length + 1)]
    assert mean_keys(budget, DOCUMENTS) == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("budget", [Budget(20, 0, 0), Budget(2.5, 0.5, 0), Budget(0.3, 1, 0)])
@pytest.mark.filterwarnings("ignore:.*always kept")
def test_executed_keys_are_those_of_the_selection(budget):
    own = {"sink": 4, "late": 0.0}
    budget = Budget(budget.alpha, budget.exponent, 0, **own)
    bounds = [0, *np.cumsum(DOCUMENTS).tolist()]
    q = torch.randn(bounds[-1], 2, 8, generator=torch.Generator().manual_seed(0))
    selection = select(q, q, budget, cu_seqlens=bounds, block=4, tile=8)
    kept = selection.to_mask().sum(-1).double().mean()
    assert executed_keys(budget, DOCUMENTS, 4, 8) == pytest.approx(float(kept), rel=1e-12)


def test_late_blocks_cost_from_their_entry_row_on():
    with_late, without = (
        executed_keys(Budget(64, 0, 0, sink=4, late=late), (256,), 4, 8) for late in (0.5, 0.0)
    )
    bounds = [0, 256]
    q = torch.randn(256, 1, 8, generator=torch.Generator().manual_seed(0)) * 20
    budget = Budget(64, 0, 0, sink=4, late=0.5)
    measured = select(q, q, budget, cu_seqlens=bounds, block=4, tile=8).to_mask().sum(-1)
    # A slot that is shared stays empty.
    assert measured.double().mean() <= with_late < without


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_all_rules_are_brought_to_the_same_cost(rule):
    documents = mixture(64, 1024)
    target = mean_keys(CONSTANT.make(48), documents)
    budget = solve(rule, lambda b: mean_keys(b, documents), target)
    assert mean_keys(budget, documents) == pytest.approx(target, rel=2e-3)
    if rule.exponent is not None:
        assert budget(1024) / budget(128) == pytest.approx(8**rule.exponent, rel=0.1)


def test_a_cost_that_no_window_has_is_refused():
    with pytest.raises(ValueError, match="no window costs 100 keys: the documents are too short"):
        solve(ADAPTIVE, lambda b: mean_keys(b, (64,)), 100)


def test_a_cost_that_the_least_window_has_is_met_by_it():
    documents = mixture(64, 128)
    least = executed_keys(CONSTANT.make(1, sink=4), documents, 4, 4)
    budget = solve(ADAPTIVE, lambda b: executed_keys(b, documents, 4, 4), least, sink=4)
    assert executed_keys(budget, documents, 4, 4) == least


def test_errors_of_a_row_are_those_of_their_definition():
    logits, values = draw(50, torch.Generator().manual_seed(1))
    assert bool((logits.diff() <= 0).all())
    found = errors((logits, values), [1.5], [7, 50])
    p = (1.5 * logits).softmax(0)
    dense, kept = p @ values, (p[:7] / p[:7].sum()) @ values[:7]
    error = (dense - kept).norm()
    expected = [p[7:].sum(), error / math.sqrt(values.shape[1]), error / dense.norm()]
    torch.testing.assert_close(found[:, 0, 0], torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[:, 0, 1], torch.zeros(3))


def _made(adaptive):
    """Errors of a constant window that are 1 at the last of two lengths and 0 at the first, and
    those given of the adaptive one, with noise that all share."""
    noise = np.random.default_rng(0).normal(0, 0.01, size=40)
    values = np.zeros((2, len(RULES), 2, 40)) + noise
    values[:, RULES.index(CONSTANT), 1] += 1
    values[:, RULES.index(ADAPTIVE)] += np.array(adaptive)[:, None]
    return values


def test_the_mean_and_the_worst_length_may_say_opposite_things():
    values, adaptive = _made([0.8, 0.8]), RULES.index(ADAPTIVE)
    mean, worst = compare(values, "mean"), compare(values, "worst")
    assert mean.lost[:, adaptive].all()
    assert worst.won[:, adaptive].all()
    assert mean.gain[0, adaptive] == pytest.approx(-0.3)
    assert worst.gain[0, adaptive] == pytest.approx(0.2)
    assert not mean.won[:, RULES.index(CONSTANT)].any()


def test_the_keys_that_a_constant_window_needs_are_read_off_its_curve():
    values = np.zeros((3, len(RULES), 2, 5))
    values[:, RULES.index(CONSTANT)] = np.array([0.4, 0.2, 0.1])[:, None, None]
    values[:, RULES.index(ADAPTIVE)] = 0.2
    ratio = keys_ratio(values, (10, 20, 40), 0, RULES.index(ADAPTIVE), "mean")
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(
    ("adaptive", "outcome"),
    [
        ([0.1, 0.1], Outcome.SUPPORTED),
        ([0.8, 0.8], Outcome.LIMITED),
        ([1.5, 1.5], Outcome.NOT_HERE),
    ],
)
def test_the_verdict_follows_the_errors(adaptive, outcome):
    values = np.stack([_made(adaptive)] * len(REGIMES))
    found = Errors((64, 512), (16.0, 32.0), np.stack([values] * len(NORMS)))
    verdict = on_synthetic_rows(found, "missed mass", 0)
    assert verdict.outcome is outcome
    assert bool(verdict.limit) == (outcome is not Outcome.SUPPORTED)


def test_the_verdict_on_the_exponent_wants_that_of_the_need():
    values = np.ones((len(NORMS), len(REGIMES), 1, len(RULES), 2, 3))
    for number, regime in enumerate(REGIMES):
        values[:, number, :, [rule.exponent for rule in RULES].index(regime.exponent)] = 0.5
    assert best_exponent(Errors((64, 512), (16.0,), values)).outcome is Outcome.SUPPORTED
    assert best_exponent(Errors((64, 512), (16.0,), values[:, ::-1])).outcome is Outcome.NOT_HERE


@pytest.mark.slow
def test_the_quick_form_reports_on_rows_and_on_a_model(small_model, tmp_path):
    out = run("windows", tmp_path, small_model)
    found = outcomes(out)
    assert len(found) == len(NORMS) + 3 + 2
    # What theory says: a window of n^.5 keys has a falling error, one of o(log n) has not.
    assert found[-1] != Outcome.NOT_HERE.value
    for name in ("synthetic_cost", "synthetic_length", "slow_windows", "trained_cost"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    executed = rows(out, "trained_executed")
    assert len(executed) == 3
    for line in executed:
        keys = [float(line[rule.name]) for rule in RULES]
        assert max(keys) == pytest.approx(min(keys), rel=0.02)
