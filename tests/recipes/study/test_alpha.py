"""Study `alpha`: the front against brute force, and verdicts where the answer is known."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_sparse.budget import Budget
from lit_sparse.calibration import ChosenLaw
from lit_sparse.cli import main
from lit_sparse.recipes.study.alpha.laws import Candidate, grid, presets
from lit_sparse.recipes.study.alpha.measure import Losses, Measured
from lit_sparse.recipes.study.alpha.pareto import distances, front, front_error
from lit_sparse.recipes.study.alpha.verdicts import against_presets, on_the_front
from lit_sparse.recipes.study.findings import Outcome, Settings


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_law_beats(seed):
    # Few values, so that costs and errors are tied.
    costs, errors = np.random.default_rng(seed).integers(1, 8, size=(2, 20)).astype(float)
    found = front(costs, errors)
    assert (np.diff(costs[found]) > 0).all()
    assert (np.diff(errors[found]) < 0).all()
    for cost, error in zip(costs, errors, strict=True):
        beaten = ((costs <= cost) & (errors <= error) & ((costs < cost) | (errors < error))).any()
        on_it = ((costs[found] == cost) & (errors[found] == error)).any()
        assert on_it == (not beaten)


def test_between_two_laws_the_front_is_straight_over_the_logarithm():
    costs, errors = np.array([10.0, 40.0, 20.0]), np.array([0.4, 0.2, 0.5])
    at = np.array([5.0, 10.0, 20.0, 40.0, 100.0])
    assert front_error(costs, errors, at) == pytest.approx([0.4, 0.4, 0.3, 0.2, 0.2])


def test_distances_have_the_front_of_each_draw():
    costs, errors = np.array([10.0, 20.0]), np.array([[0.4, 0.1], [0.2, 0.3]])
    found = distances(costs, errors, np.array([20.0]), np.array([[0.25, 0.25]]))
    assert found == pytest.approx(np.array([[0.05, 0.15]]))


def test_presets_keep_the_share_that_they_keep_at_long_contexts():
    laws = {law.name: law.chosen.budget for law in presets(512)}
    assert laws["balanced as at 8192"](512) == pytest.approx(1449 / 16, abs=1)
    assert laws["safe as at 32768"](512) == pytest.approx(4096 / 64, abs=1)
    assert laws["eco as at 32768"].exponent == pytest.approx(1 / 3)


def test_a_grid_goes_through_shares_of_the_longest_context():
    laws = grid(Settings(Path(), Path()), 512)
    ends = {law.chosen.budget(512) for law in laws}
    assert ends == {32, 64, 96, 128, 192, 256}
    assert len(laws) == 5 * len(ends)


def _measured(calibrated, right=1.0):
    """A grid whose front is .4, .2, .1 nats at 10, 20, 40 keys, presets .1 above it, and a
    calibrated law at 20 keys."""
    keys = np.array([20.0, 10, 20, 40, 10, 20, 40])
    loss = np.array([calibrated, 0.4, 0.2, 0.1, 0.5, 0.3, 0.2])
    kinds = ["calibrated"] + ["grid"] * 3 + ["preset"] * 3
    laws = [Candidate(kind, kind, ChosenLaw(Budget(4, 0.5, 0))) for kind in kinds]
    noise = np.random.default_rng(0).normal(0, 0.01, size=12)
    losses = [
        Losses(name, (128, 256), keys, loss[:, None] + noise, np.ones(7), 2.0, right)
        for name in ("text", "passkey")
    ]
    return Measured("made", 256, laws, losses)


@pytest.mark.parametrize(
    ("calibrated", "front_outcome", "presets_outcome"),
    [
        (0.15, Outcome.SUPPORTED, Outcome.SUPPORTED),
        (0.215, Outcome.SUPPORTED, Outcome.SUPPORTED),  # within 1 % of a dense loss of 2 nats
        (0.25, Outcome.NOT_HERE, Outcome.SUPPORTED),
        (0.35, Outcome.NOT_HERE, Outcome.NOT_HERE),
    ],
)
def test_verdicts_follow_the_distance_at_equal_keys(calibrated, front_outcome, presets_outcome):
    found = [_measured(calibrated)]
    assert [v.outcome for v in on_the_front(found, 0)] == [front_outcome] * 2
    assert against_presets(found, 0).outcome is presets_outcome


def test_a_task_that_the_dense_model_cannot_do_has_no_weight():
    text, passkey = on_the_front([_measured(0.15, right=0.1)], 0)
    assert text.outcome is Outcome.SUPPORTED
    assert passkey.outcome is Outcome.NOT_HERE
    assert "cannot do the task (made)" in passkey.limit


def test_a_calibration_that_leaves_every_layer_dense_is_no_law():
    found = _measured(0.15)
    losses = [
        replace(own, keys=own.keys[1:], loss=own.loss[1:], right=own.right[1:])
        for own in found.losses
    ]
    text, _ = on_the_front([replace(found, laws=found.laws[1:], losses=losses)], 0)
    assert text.outcome is Outcome.NOT_HERE
    assert text.limit == "The calibration leaves every layer dense at every target."


@pytest.mark.slow
def test_the_quick_form_calibrates_and_holds_laws_against_each_other(small_model, tmp_path):
    asked = ["study", "alpha", str(small_model), "--quick", "--out", str(tmp_path / "out")]
    assert main([*asked, "--work", str(tmp_path)]) == 0
    verdicts = json.loads((tmp_path / "out" / "verdicts.json").read_text())["verdicts"]
    assert len(verdicts) == 5
    assert (tmp_path / "out" / "losses.png").stat().st_size > 10_000
    with (tmp_path / "out" / "losses.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["task"] == "text"]
    kinds = {line["kind"] for line in lines}
    assert kinds == {"calibrated", "grid", "preset"}
    # More keys of one C are more keys that are read.
    keys = [float(line["executed keys"]) for line in lines if line["kind"] == "grid"]
    assert keys[:3] == sorted(keys[:3])
