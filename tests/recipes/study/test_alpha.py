"""Study `alpha`: the front against brute force, and verdicts where the answer is known."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_sparse.budget import PRESETS, Budget
from lit_sparse.calibration import ChosenLaw
from lit_sparse.recipes.study.alpha.laws import Candidate, grid, presets
from lit_sparse.recipes.study.alpha.measure import Losses, Measured
from lit_sparse.recipes.study.alpha.pareto import distances, front, front_error
from lit_sparse.recipes.study.alpha.verdicts import against_presets, on_the_front
from lit_sparse.recipes.study.findings import Outcome, Settings

sys.path.append(str(Path(__file__).parent))
from reports import outcomes, rows, run


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
    assert laws["balanced x 1"](512) == pytest.approx(2897 / 64, abs=1)
    assert laws["safe x 4"](512) == pytest.approx(4 * 4096 / 64, abs=1)
    assert laws["eco x 2"].exponent == pytest.approx(1 / 3)


def test_a_grid_goes_through_shares_of_the_longest_context():
    laws = grid(Settings(Path(), Path()), 512)
    ends = {law.chosen.budget(512) for law in laws}
    assert ends == {32, 64, 96, 128, 192, 256, 384}
    assert len(laws) == 5 * len(ends)


def _measured(calibrated, right=1.0):
    """A grid whose front is .4, .2, .1 nats at 10, 20, 40 keys, every preset .1 above it, and a
    calibrated law at 20 keys."""
    keys = np.array([20.0] + [10, 20, 40] * 5)
    loss = np.array([calibrated, 0.4, 0.2, 0.1] + [0.5, 0.3, 0.2] * 4)
    budget = ChosenLaw(Budget(4, 0.5, 0))
    laws = [Candidate("calibrated", "made", budget)]
    laws += [Candidate("grid", f"{i}", budget) for i in range(3)]
    laws += [Candidate("preset", name, budget, name) for name in PRESETS for _ in range(3)]
    noise = np.random.default_rng(0).normal(0, 0.01, size=12)
    losses = [
        Losses(name, (128, 256), keys, loss[:, None] + noise, np.ones(16), 2.0, right, 60.0)
        for name in ("text", "passkey")
    ]
    return Measured("made", 256, laws, losses, [])


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


def test_a_law_that_keeps_nearly_everything_does_not_count():
    found = _measured(0.15)
    losses = [replace(own, dense_keys=21.0) for own in found.losses]
    text, _ = on_the_front([replace(found, losses=losses)], 0)
    assert text.outcome is Outcome.NOT_HERE
    assert text.limit == "Targets left out, which need 90% of the keys or more: 1."


def test_a_calibration_that_leaves_every_layer_dense_is_no_law():
    found = _measured(0.15)
    losses = [
        replace(own, keys=own.keys[1:], loss=own.loss[1:], right=own.right[1:])
        for own in found.losses
    ]
    text, _ = on_the_front([replace(found, laws=found.laws[1:], losses=losses, dense=["95%"])], 0)
    assert text.outcome is Outcome.NOT_HERE
    assert text.limit == "Targets left out, which need 90% of the keys or more: 1."


@pytest.mark.slow
def test_the_quick_form_calibrates_and_holds_laws_against_each_other(small_model, tmp_path):
    out = run("alpha", tmp_path, small_model)
    assert len(outcomes(out)) == 5
    assert (out / "losses.png").stat().st_size > 10_000
    text = [line for line in rows(out, "losses") if line["task"] == "text"]
    assert {line["kind"] for line in text} == {"calibrated", "grid", "preset"}
    # More keys of one C are more keys that are read.
    keys = [float(line["executed keys"]) for line in text if line["kind"] == "grid"]
    assert keys[:4] == sorted(keys[:4])
