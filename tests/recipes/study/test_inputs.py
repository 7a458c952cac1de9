"""The synthetic rows: what is asked of them is so."""

import pytest
import torch

from lit_sparse import theory
from lit_sparse.recipes.study.inputs import (
    D_HEAD,
    D_MODEL,
    Growth,
    draw,
    projections,
    rademacher,
    uniform,
)


def _generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("norm", [1.0, 3.5])
def test_the_norm_of_the_weights_is_what_was_asked(norm):
    w_q, w_k = projections(4, norm, _generator())
    full = (w_q.double() @ w_k.double().mT / D_HEAD**0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(full, torch.full((4,), norm, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("tokens", "variance"), [(rademacher, 1.0), (uniform, 1 / 3)])
def test_entries_are_bounded_and_independent(tokens, variance):
    x = tokens(20000, 8, _generator())
    assert x.abs().max() <= 1
    moments = x.T @ x / len(x)
    torch.testing.assert_close(moments, variance * torch.eye(8), atol=0.03, rtol=0)
    assert x.mean(0).abs().max() < 0.03


def test_logits_are_those_of_the_last_token():
    def tokens(n, entries, generator):
        kept["x"] = rademacher(n, entries, generator)
        return kept["x"]

    kept = {}
    rows = draw(tokens, 64, 3, _generator())
    generator = _generator()
    rademacher(64, kept["x"].shape[1], generator)
    w_q, w_k = projections(3, 1.0, generator)
    x = kept["x"][:, :D_MODEL]
    expected = x[-1] @ (w_q @ w_k.mT / D_HEAD**0.5) @ x.T
    torch.testing.assert_close(rows.logits, expected, atol=1e-4, rtol=1e-4)
    assert rows.largest_entry == 1


def test_the_standard_deviation_of_logits_is_the_rows_scale():
    rows = draw(rademacher, 20000, 16, _generator())
    torch.testing.assert_close(rows.logits.std(1), rows.row_scale, rtol=0.03, atol=0)
    # R = 1 is its root mean square over rows and heads.
    assert rows.row_scale.square().mean().item() == pytest.approx(1, abs=0.2)


def test_values_have_mean_square_1_and_only_the_linear_ones_know_the_scores():
    rows = draw(rademacher, 20000, 1, _generator())
    logits = rows.logits[0] / rows.logits[0].norm()
    for values in (rows.values, rows.linear_values):
        assert values.square().mean().item() == pytest.approx(1)
    known = (logits @ rows.linear_values).norm(), (logits @ rows.values).norm()
    assert known[0] > 10 * known[1]


def test_a_shorter_context_is_the_nearest_part():
    rows = draw(rademacher, 100, 2, _generator())
    near = rows.nearest(30)
    assert torch.equal(near.logits, rows.logits[:, 70:])
    assert torch.equal(near.values, rows.values[70:])
    assert torch.equal(near.row_scale, rows.row_scale)


def test_growths_have_the_gamma_that_they_are_named_for():
    for n in (1024, 65536):
        assert float(theory.gamma(Growth.at_gamma(0.75).radius(n), n)) == pytest.approx(0.75)
    slow, fast = Growth.slow(), Growth.logarithmic(0.5)
    assert theory.gamma(slow.radius(2**30), 2**30) < theory.gamma(slow.radius(2**10), 2**10)
    assert theory.gamma(fast.radius(2**30), 2**30) > theory.gamma(fast.radius(2**10), 2**10)
