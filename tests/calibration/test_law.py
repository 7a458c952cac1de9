from dataclasses import replace

import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.calibration import ChosenLaw, choose_law, feasibility, fit_heads
from lit_sparse.theory import required_logit_range

HEADS = torch.ones(1, 4, dtype=torch.float64)


def _fits(simulate, laws, **options):
    """Of layers (alpha, C) of four equal heads."""
    alpha, exponent = torch.tensor(laws, dtype=torch.float64).T[..., None] * HEADS
    return fit_heads(simulate(lambda n: alpha * n**exponent, **options), which="keys")


def test_one_law_where_one_is_enough(simulate):
    law = choose_law(_fits(simulate, [(6, 0.5), (5.5, 0.5)]), block=16)
    assert law.layers == {}
    assert law.warnings == ()
    assert law.budget.exponent == pytest.approx(0.5, abs=0.011)
    assert law.budget(4096) == pytest.approx(6 * 64, rel=0.03)
    # From the shortest measured context on: below, nothing was seen.
    assert law.budget.floor == pytest.approx(6 * 384**0.5, abs=17)
    assert law.budget.floor % 16 == 0
    assert not law.dense


def test_a_layer_that_needs_more_has_its_own_alpha(simulate):
    law = choose_law(_fits(simulate, [(6, 0.5)] * 11 + [(18, 0.5)]), sink=16, local=0.5, floor=100)
    assert list(law.layers) == [11]
    assert law.of(11)(4096) == pytest.approx(18 * 64, rel=0.03)
    assert law.of(0)(4096) == pytest.approx(6 * 64, rel=0.03)
    assert {(b.sink, b.local, b.floor) for b in (law.budget, law.of(11))} == {(16, 0.5, 100)}


def test_a_steeper_layer_is_satisfied_at_the_longest_measured_context(simulate):
    fits = _fits(simulate, [(6, 0.5)] * 4 + [(0.9, 0.75)])
    law = choose_law(fits)
    assert law.of(4)(4096) >= 0.97 * 0.9 * 4096**0.75


def test_layers_in_proportion_stay_dense(simulate):
    law = choose_law(_fits(simulate, [(0.3, 1.0), (6, 0.5), (0.4, 0.97)]))
    assert law.layers == {0: Budget.dense(), 2: Budget.dense()}
    assert law.budget.exponent == pytest.approx(0.5, abs=0.011)
    assert law.warnings == (
        "In layers 0 and 2 the need of a quarter of the heads, or more, is proportional to the "
        "context: no sublinear budget is written for them, which stay dense.",
    )


def test_a_model_in_proportion_gets_no_sublinear_budget(simulate):
    law = choose_law(_fits(simulate, [(0.3, 1.0), (0.5, 1.0)]))
    assert law.dense
    assert law.budget == Budget.dense()
    assert law.scaled(2).dense
    assert "all 2 layers" in law.warnings[0]


def test_what_speaks_against_a_law_is_said(simulate):
    def bent(n):
        away = (n / 1300).log()
        return 100 * (0.5 * away + 0.15 * away.square()).exp() * HEADS

    warnings = choose_law(fit_heads(simulate(bent, of_row=0.02), which="keys")).warnings
    assert "A power law does not fit 4 of 4 heads (layer 0)" in warnings[0]
    assert "do not use the budget beyond 8" in warnings[1]
    assert "twice the longest measured context" in warnings[1]

    noisy = _fits(simulate, [(6, 0.5)], of_document=0.5, documents=12)
    assert "measure more documents" in choose_law(noisy).warnings[-1]

    idle = choose_law(_fits(simulate, [(6, 0.5)]), floor=4000)
    assert "budget of layer 0 keeps 90 % and more of the keys" in idle.warnings[0]


def test_layers_have_the_numbers_that_they_have_in_the_model(simulate):
    """Between them lie others, with sliding windows, which were not measured."""
    alpha, exponent = torch.tensor([[6, 0.5], [0.5, 1], [6, 0.5]]).double().T[..., None] * HEADS
    needs = simulate(lambda n: alpha * n**exponent, logit_range=4.0)
    fits = fit_heads(replace(needs, layers=(1, 5, 11)), which="keys")
    law = choose_law(fits)
    assert law.layers == {5: Budget.dense()}
    assert law.warnings[0].startswith("In layer 5 the need of a quarter")
    narrow = ChosenLaw(Budget.dense(), {11: Budget.fixed(512)})
    assert "layer 11 head 0" in feasibility(fits, narrow, [32768]).sentences[0]
    with pytest.raises(ValueError, match="layers names 2 layers, keys has 3"):
        replace(needs, layers=(1, 5))


def test_a_law_builds_itself_again_and_is_scaled_whole():
    law = ChosenLaw(
        Budget(3.0, 0.6, floor=64, sink=16),
        {1: Budget.dense(), 2: Budget(9.0, 0.6, floor=64, sink=16)},
    )
    parts = law.to_dict()
    assert Budget(**parts["budget"]) == law.budget
    assert {n: Budget(**own) for n, own in parts["layers"].items()} == law.layers
    scaled = law.scaled(1.5)
    assert scaled.budget.alpha == 4.5
    assert scaled.of(1) == Budget.dense()
    assert scaled.of(2).alpha == 13.5


def test_the_range_that_a_budget_requires_is_held_against_that_of_the_logits(simulate):
    """64 sink and 64 local tokens are always kept, so 384 of 512 keys are left for the others."""
    fits = _fits(simulate, [(6, 0.5), (6, 0.5)], logit_range=4.0)
    law = ChosenLaw(Budget.fixed(512), {1: Budget.dense()})
    found = feasibility(fits, law, [512, 4096, 32768])
    expected = required_logit_range(torch.tensor([3968.0, 32640.0]), 384, 0.05)
    torch.testing.assert_close(found.required[1:, 0], expected)
    assert found.required[0, 0] == 0
    assert (found.required[:, 1] == 0).all()
    torch.testing.assert_close(found.measured, torch.full((3, 2, 4), 4.0, dtype=torch.float64))
    assert found.infeasible[:, 0, 0].tolist() == [False, True, True]
    assert not found.infeasible[:, 1].any()
    assert len(found.sentences) == 2
    assert found.sentences[1].startswith(
        "At 32768 tokens the logits of 4 of 8 heads are too narrow"
    )
    assert "layer 0 head 0" in found.sentences[1]
    assert not feasibility(fits, law, [4096], missed=0.5).infeasible.any()
    with pytest.raises(ValueError, match="lengths must be positive"):
        feasibility(fits, law, [])
