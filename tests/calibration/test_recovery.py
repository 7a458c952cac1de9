"""Known laws are found again, through measured rows and through simulated ones."""

import pytest
import torch

from lit_sparse.attention.need import rows_need
from lit_sparse.attention.options import Options
from lit_sparse.calibration import Needs, fit_heads
from lit_sparse.theory import gaussian_keys_fraction

EXPONENTS = torch.tensor([0.0, 0.3, 0.5, 0.8], dtype=torch.float64)
ALPHAS = torch.tensor([40.0, 12.0, 6.0, 1.5], dtype=torch.float64)
MISSED = 0.1
LENGTHS = (256, 512, 1024, 2048)
EXACTLY = {"missed": MISSED, "block": 1, "sink": 0, "local": 0}


def _two_level(length, generator):
    """q, k [length, 4 heads, 1]: of the first n keys floor(alpha n^C) are heavy, in any order, and
    share 1 - missed / 2 of the softmax of row n (scale 1)."""
    n = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
    heavy = torch.minimum((ALPHAS * n**EXPONENTS).floor().clamp(min=1), n)
    k = heavy.diff(dim=0, prepend=torch.zeros(1, 4))
    light = (n - heavy).clamp(min=1e-3)
    gap = (light / heavy).log() - torch.logit(torch.tensor(MISSED / 2, dtype=torch.float64))
    return gap.unsqueeze(-1), k.unsqueeze(-1)


def _gaussian(sigma):
    def build(length, generator):
        k = torch.randn(length, 4, 1, generator=generator, dtype=torch.float64)
        return torch.full_like(k, sigma), k

    return build


def _measure(build, seed, documents=32, rows=4, **options):
    options = EXACTLY | options
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for document in range(documents):
        length = LENGTHS[document % 4]
        q, k = build(length, generator)
        late = torch.randint(3 * length // 4, length, (rows,), generator=generator)
        measured.append((document, [rows_need(q, k, late, options=Options(1.0), **options)]))
    return Needs.gather(measured, **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("which", ["keys", "block_keys"])
def test_measured_two_level_rows_give_their_alpha_and_exponent(which, seed):
    fits = fit_heads(_measure(_two_level, seed), which=which, seed=seed)
    assert (fits.exponent_low[0] <= EXPONENTS).all()
    assert (fits.exponent_high[0] >= EXPONENTS).all()
    # Heavy keys share 1 - missed / 2, so that not quite all of them are needed for 1 - missed.
    needed = ALPHAS * fits.n_ref**EXPONENTS * (1 - MISSED) / (1 - MISSED / 2)
    assert (fits.k_ref_low[0] <= needed).all()
    assert (fits.k_ref_high[0] >= needed).all()
    # The intervals say something: rows without noise leave them the rounding to whole keys.
    assert (fits.exponent_high - fits.exponent_low < 0.1).all()
    assert fits.verdict == [["constant", "power", "power", "power"]]


@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_measured_gaussian_rows_need_a_share_of_the_context(sigma, seed):
    needs = _measure(_gaussian(sigma), seed)
    assert fit_heads(needs).verdict == [["proportional"] * 4]
    # The share is that of the middle row.
    share = (fit_heads(needs, quantile=0.5, samples=20).keys_at(2048) / 2048).mean()
    assert share == pytest.approx(float(gaussian_keys_fraction(sigma, MISSED)), abs=0.015)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("which", ["keys", "block_keys"])
def test_keys_that_are_always_kept_do_not_hide_a_need_in_proportion(which, seed):
    """128 of them at 193 to 2048 tokens: k = 128 + a (n - 128) looks like n to the power .7."""
    options = {"sink": 64, "local": 64, "block": 2}
    fits = fit_heads(_measure(_gaussian(2.0), seed, **options), which=which)
    assert (fits.exponent < 0.8).all()
    assert fits.verdict == [["proportional"] * 4]
    # The same keys always kept, the others by a power law. (With C = 0 all heavy ones come first.)
    fits = fit_heads(_measure(_two_level, seed, **options), which=which)
    assert fits.verdict[0][1:] == ["power"] * 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intervals_hold_the_truth_about_as_often_as_they_say(simulate, seed):
    """95 % intervals, 32 documents with effects of their own, 4 x 20 heads that share nothing."""
    noise = {"of_document": 0.2, "of_row": 0.2, "seed": seed}
    needs = simulate(
        lambda n: (ALPHAS[:, None] * n ** EXPONENTS[:, None]).repeat(1, 1, 20), **noise
    )
    fits = fit_heads(needs, which="keys", seed=seed)
    holds = (fits.exponent_low <= EXPONENTS[:, None]) & (EXPONENTS[:, None] <= fits.exponent_high)
    # Level of the 9th of 10 rows: factors are lognormal.
    upper = (
        (1.2816 * (0.2**2 + 0.2**2) ** 0.5)
        + ALPHAS.log()
        + EXPONENTS * torch.tensor(fits.n_ref).log()
    )
    level = (fits.k_ref_low.log() <= upper[:, None]) & (upper[:, None] <= fits.k_ref_high.log())
    assert 0.88 <= float(holds.double().mean()) <= 0.99
    assert 0.85 <= float(level.double().mean()) <= 0.99
