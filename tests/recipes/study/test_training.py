"""The study of training: rules of equal executed keys, and what is said of their losses."""

import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_sparse import Budget, select
from lit_sparse.evaluation import PositionLoss
from lit_sparse.models import build_model
from lit_sparse.recipes.study.findings import Outcome
from lit_sparse.recipes.study.fits import Fit, run_fits, shipped_keys
from lit_sparse.recipes.study.start import write_start
from lit_sparse.recipes.study.training import verdicts
from lit_sparse.recipes.study.training.arms import Arm, arms, executed
from lit_sparse.recipes.study.training.measure import Result

sys.path.append(str(Path(__file__).parent))
from reports import outcomes, rows, run

ROWS = [[700, 200, 100], [1000], [130, 870]]
LAW = Budget(alpha=8.0, exponent=0.5, floor=0, sink=16, local=0.5)


@pytest.mark.parametrize("budget", [LAW, Budget.fixed(160, sink=16, local=0.25), Budget.dense()])
def test_executed_pairs_are_those_of_a_real_selection(budget):
    wanted = 0
    for row in ROWS:
        bounds = torch.tensor([0, *accumulate(row)], dtype=torch.int32)
        q, k = torch.randn(1000, 2, 8), torch.randn(1000, 1, 8)
        selection = select(q, k, budget, bounds, block=16, tile=16)
        slots = torch.as_tensor(selection.offsets).diff()
        rows = [min(16, length - start) for length in row for start in range(0, length, 16)]
        wanted += int((slots * torch.tensor(rows)).sum()) * 16
    assert executed(budget, ROWS, 16, 16) == wanted


def test_windows_of_one_size_execute_what_the_law_does_and_less_than_a_block_more():
    dense, law, without, quarter, fixed, sliding, variance, exact = arms(LAW, ROWS, 16, 16)
    assert dense.executed == 1
    assert law.executed == without.executed < 0.5
    assert law.budget == variance.budget == exact.budget
    assert variance.keys()["sparse_attention.score"] == variance.score == "variance"
    assert (law.budget.late, without.budget.late) == (0.1, 0.0)
    assert (quarter.budget.local, fixed.budget.local, sliding.budget.local) == (0.25, 0.5, 1.0)
    for arm in (fixed, sliding):
        size = arm.budget(1 << 20)
        assert arm.budget(3000) == size
        fewer = Budget.fixed(size - 16, sink=16, local=arm.budget.local)
        assert arm.executed >= law.executed
        assert executed(fewer, ROWS, 16, 16) < executed(LAW, ROWS, 16, 16)


def _results(arm: str, losses: dict[int, list[float]]) -> list[Result]:
    """A run for each seed, with a loss of each of some texts of 64 tokens."""
    runs = []
    for seed, texts in losses.items():
        nats = np.array(texts)[:, None] * np.array([16, 31, 16])
        loss = {64: PositionLoss((0, 17, 64), (0, 17, 48, 64), nats)}
        kind = Arm(arm, arm, LAW, 0.2)
        runs.append(Result(kind, seed, loss, loss, {}, 0.5, 1.0, 1.0))
    return runs


@pytest.mark.parametrize(
    ("cost", "outcome"),
    [
        ([0.004, 0.005, 0.006], Outcome.SUPPORTED),
        ([-0.02, 0.005, 0.03], Outcome.LIMITED),
        ([0.02, 0.03, 0.04], Outcome.NOT_HERE),
    ],
)
def test_what_the_law_costs_decides_its_verdict(cost, outcome):
    dense = {0: [2.0, 1.5, 1.0], 1: [2.1, 1.4, 1.1]}
    law = {s: [a * (1 + c) for a, c in zip(x, cost, strict=True)] for s, x in dense.items()}
    worse = {s: [a * 1.05 for a in x] for s, x in law.items()}
    results = [
        *_results("dense", dense),
        *_results("law", law),
        *_results("law-no-late", law),
        *_results("law-local", worse),
        *_results("fixed", worse),
        *_results("sliding", dense),
        *_results("law-variance", dense),
        *_results("law-exact", dense),
    ]
    near, fixed, sliding, late, local, *_ = verdicts.all_of(results)
    assert near.outcome == outcome
    assert fixed.outcome == Outcome.SUPPORTED
    assert "+5.00 %" in fixed.numbers
    assert sliding.outcome != Outcome.SUPPORTED or np.mean(cost) < 0
    assert late.outcome == Outcome.NOT_HERE
    assert local.outcome == Outcome.SUPPORTED


@torch.no_grad()
def test_the_start_of_the_base_predicts_what_followed_a_token_before(tmp_path):
    write_start(shipped_keys("study_base")["model"]["architecture"], tmp_path, seed=1)
    model = build_model(pretrained=tmp_path).eval()
    run = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(0))
    logits = model(torch.cat([run, run], 1)).logits[0]
    again = logits[100:-1].log_softmax(-1).gather(-1, run[0, 1:, None])
    first = logits[:99].log_softmax(-1).gather(-1, run[0, 1:, None])
    assert again.mean() > first.mean() + 0.3


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"training broken failed .*no shipped config"):
        run_fits([Fit("broken", "nothing-like-it", {})], tmp_path, 1, lambda text: None)


@pytest.mark.slow
def test_the_quick_form_trains_once(tmp_path):
    out = run("training", tmp_path)
    found = outcomes(out)
    assert len(found) == 8
    executed = {row["rule"]: float(row["executed / dense pairs"]) for row in rows(out, "summary")}
    assert executed["dense"] == 1
    assert len({round(share, 1) for share in executed.values()}) == 2
    records = sorted((out / "work" / "fine-tunes").glob("*.json"))
    assert len(records) == 8
    before = [path.stat().st_mtime_ns for path in records]
    assert outcomes(run("training", tmp_path)) == found
    assert [path.stat().st_mtime_ns for path in records] == before
