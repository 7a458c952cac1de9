from dataclasses import replace

import pytest
import torch

from lit_sparse.calibration import Needs, fit_heads
from lit_sparse.calibration.fit import _shrink
from lit_sparse.calibration.forms import FORMS, compare_forms
from lit_sparse.theory import gaussian_keys_fraction

HALF = torch.full((1, 6), 0.5, dtype=torch.float64)


def _curve(form, x):
    n = x.exp()
    sigma = 0.5 + 0.4 * (x - x.mean())
    return {
        "constant": 90 + 0 * n,
        "log": 300 * (x - 5.5),
        "power": 4 * n**0.6,
        "linear": 0.3 * n,
        "gaussian": n * gaussian_keys_fraction(1 + sigma, 0.05),
    }[form].log()


@pytest.mark.parametrize("form", FORMS)
def test_the_form_that_made_the_needs_is_the_best(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(6, 9, 32, dtype=torch.float64)
    noise = 0.03 * torch.randn(20, 32, generator=generator, dtype=torch.float64)
    sigma = (1.5 + 0.4 * (x - x.mean())).repeat(20, 1)
    bic = compare_forms(x, _curve(form, x) + noise, sigma, 0.05, x.exp())
    best = [FORMS[i] for i in bic.argmin(0).tolist()]
    assert best.count(form) >= 18, best


def test_a_bent_need_is_no_power_law(simulate):
    """C grows from .2 to .8 over the measured contexts, or falls as much; noise hides nothing."""

    def law(n):
        away = (n / 1300).log()
        bends = torch.tensor([0.15, -0.15], dtype=torch.float64)
        return 100 * (0.5 * away + bends * away.square()).exp()

    fits = fit_heads(simulate(law, of_document=0.02, of_row=0.05), which="keys")
    assert fits.verdict == [["no power law", "no power law"]]
    assert fits.convex.tolist() == [[True, False]]
    # d C / d ln n = .3, in doublings.
    assert float(fits.curvature[0, 0]) == pytest.approx(0.3 * 0.693, abs=0.03)


def test_healthy_noise_is_no_evidence_against_a_power_law(simulate):
    needs = simulate(lambda n: 4 * n ** HALF[..., :1].expand(1, 60), of_document=0.2, of_row=0.2)
    fits = fit_heads(needs, which="keys")
    assert sum(v == "power" for v in fits.verdict[0]) >= 57
    assert fits.convex.double().mean() < 0.1


def test_the_law_is_that_of_the_upper_rows(simulate):
    """Rows scatter by more where n is larger, so the 9th of 10 grows faster than the middle one."""
    generator = torch.Generator().manual_seed(1)

    def law(n):
        scatter = 0.2 + 0.15 * (n / 1300).log()
        noise = torch.randn(len(n), 1, 6, generator=generator, dtype=torch.float64)
        return 8 * n**HALF * (scatter * noise).exp()

    needs = simulate(law, rows=16)
    upper, middle = fit_heads(needs, "keys"), fit_heads(needs, "keys", quantile=0.5)
    assert float(upper.exponent.mean()) == pytest.approx(0.5 + 1.28 * 0.15, abs=0.05)
    assert float(middle.exponent.mean()) == pytest.approx(0.5, abs=0.05)


def test_uncertain_exponents_are_drawn_to_their_layer(simulate):
    noisy = simulate(lambda n: 4 * n**HALF, of_document=0.4, seed=5)
    fits = fit_heads(noisy, which="keys")
    centre = fits.raw_exponent.quantile(0.5)
    assert (fits.exponent - centre).abs().sum() < 0.6 * (fits.raw_exponent - centre).abs().sum()
    # Heads that differ for certain stay where they are.
    raw = torch.tensor([[0.2, 0.4, 0.6, 0.8]])
    torch.testing.assert_close(_shrink(raw, torch.full_like(raw, 0.01)), raw, rtol=0, atol=1e-3)
    torch.testing.assert_close(_shrink(raw, torch.full_like(raw, 0.5)), torch.full_like(raw, 0.5))


def test_exponents_stay_in_range_and_say_what_was_measured(simulate):
    steep = torch.tensor([[-0.3, 1.2]], dtype=torch.float64)
    fits = fit_heads(simulate(lambda n: 0.05 * n**steep + 3, of_row=0.02), which="keys")
    assert fits.exponent.min() >= 0
    assert fits.exponent.max() <= 1
    assert (fits.exponent_low <= fits.raw_exponent).all()
    assert (fits.raw_exponent <= fits.exponent_high).all()


def test_the_law_of_a_head_lies_within_its_band(simulate):
    fits = fit_heads(simulate(lambda n: 4 * n**HALF, of_document=0.2, of_row=0.1), which="keys")
    lengths = torch.tensor([1, 600, 4000, 64000])
    keys, (low, high) = fits.keys_at(lengths), fits.band_at(lengths)
    assert keys.shape == (4, 1, 6)
    assert ((low <= keys) & (keys <= high)).all()
    assert (keys <= lengths[:, None, None]).all()
    torch.testing.assert_close(fits.keys_at(fits.n_ref), fits.k_ref)
    width = (high / low).log()
    assert (width[3] > width[1]).all()


def test_a_fit_repeats_and_depends_on_its_seed_only(simulate):
    needs = simulate(lambda n: 4 * n**HALF, of_document=0.2)
    one, again = fit_heads(needs, "keys", seed=3), fit_heads(needs, "keys", seed=3)
    assert torch.equal(one.exponent_low, again.exponent_low)
    assert torch.equal(one.k_ref, again.k_ref)
    other = fit_heads(needs, "keys", seed=4)
    assert torch.equal(one.raw_exponent, other.raw_exponent)
    assert not torch.equal(one.exponent_low, other.exponent_low)


def test_more_values_than_quantiles_take_at_once(simulate, monkeypatch):
    needs = simulate(lambda n: 4 * n**HALF, of_document=0.2)
    whole, quantile = fit_heads(needs, "keys"), torch.quantile

    def limited(values, *others, **keywords):
        assert values.numel() <= 1300, "as PyTorch refuses 2^24"
        return quantile(values, *others, **keywords)

    monkeypatch.setattr(torch, "quantile", limited)
    monkeypatch.setattr("lit_sparse.calibration.quantiles._LARGEST", 600)
    parts = fit_heads(needs, "keys")
    torch.testing.assert_close(parts.k_ref, whole.k_ref)
    torch.testing.assert_close(parts.exponent, whole.exponent)


def test_whole_blocks_widen_what_is_known(simulate):
    needs = simulate(lambda n: 4 * n**HALF)
    fine = fit_heads(needs)
    coarse = fit_heads(replace(needs, block=32))
    assert (coarse.exponent_high - coarse.exponent_low > 0.2).all()
    assert (fine.exponent_high - fine.exponent_low < 0.1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": 7}, "7 documents are too few to fit a law: measure at least 8"),
        ({"lengths": (512, 4096)}, "contexts too short to fit a law: 2 lengths"),
        ({"lengths": (150, 300, 900)}, "no others than the 128 that are always kept"),
        ({"lengths": (1000, 1050, 1100)}, "too short to fit a law: 1 lengths, contexts of"),
        ({"lengths": (512, 700, 1000)}, "at least 3 lengths whose contexts span a factor of 4"),
    ],
)
def test_what_cannot_be_fitted_is_said(options, message, simulate):
    with pytest.raises(ValueError, match=message):
        fit_heads(simulate(lambda n: 4 * n**HALF, **options), which="keys")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "values"}, "which must be 'keys' or 'block_keys'"),
        ({"quantile": 1.0}, "quantile must lie strictly between 0 and 1"),
        ({"samples": 5}, "samples must be at least 20"),
    ],
)
def test_options_out_of_range_are_named(options, message, simulate):
    with pytest.raises(ValueError, match=message):
        fit_heads(simulate(lambda n: 4 * n**HALF), **options)


def test_needs_that_do_not_fit_together_are_refused(simulate):
    needs = simulate(lambda n: 4 * n**HALF)
    with pytest.raises(ValueError, match=r"support must be \[256 rows, layers, heads\]"):
        replace(needs, support=needs.support[:, :, :2])
    with pytest.raises(ValueError, match="document and context"):
        replace(needs, context=needs.context[:3])
    with pytest.raises(ValueError, match="keys has values that are not finite"):
        replace(needs, keys=needs.keys / 0 * 0)
    with pytest.raises(ValueError, match="no documents were measured"):
        Needs.gather([])
