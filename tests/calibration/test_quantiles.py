import pytest
import torch

from lit_sparse.calibration.quantiles import (
    quantile_lines,
    resample,
    standard_error,
    widening,
)


def _loss(x, y, weights, line, quantile):
    """The check loss of lines (a, b), [...] each."""
    residual = y - line[0][..., None] - line[1][..., None] * x
    return (weights * torch.where(residual > 0, quantile, quantile - 1) * residual).sum(-1)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "counts"])
def test_lines_are_nearly_the_best_there_are(kind, quantile):
    """The best line passes through two points: all pairs are tried."""
    generator = torch.Generator().manual_seed(1)
    x = 6 + 2 * torch.rand(60, generator=generator, dtype=torch.float64)
    y = 1 + 0.5 * x + 0.3 * torch.randn(5, 60, generator=generator, dtype=torch.float64)
    if kind == "heavy tails":
        y[:, ::9] += 3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    elif kind == "counts":
        y = (y - 3).exp().ceil().log()
    weights = torch.ones(3, 60, dtype=torch.float64)
    weights[1:] = torch.randint(3, (2, 60), generator=generator)
    lines = quantile_lines(x, y, weights, quantile)
    i, j = torch.triu_indices(60, 60, 1)
    for sample, own in enumerate(weights):
        for head, values in enumerate(y):
            slope = (values[j] - values[i]) / (x[j] - x[i])
            best = _loss(x, values, own, (values[i] - slope * x[i], slope), quantile).min()
            found = _loss(x, values, own, tuple(v[sample, head] for v in lines), quantile)
            assert best <= found <= 1.02 * best


def test_a_head_does_not_depend_on_the_others(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(40, generator=generator, dtype=torch.float64)
    y = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    weights = torch.ones(2, 40, dtype=torch.float64)
    together = quantile_lines(x, y, weights, 0.9)
    monkeypatch.setattr("lit_sparse.calibration.quantiles._CHUNK_BYTES", 1)
    for one, other in zip(together, quantile_lines(x, y, weights, 0.9), strict=True):
        torch.testing.assert_close(one, other)


def test_lines_without_scatter_are_found():
    x = torch.linspace(5, 9, 30, dtype=torch.float64)
    weights = torch.ones(1, 30, dtype=torch.float64)
    intercept, slope = quantile_lines(x, torch.stack([2 + 0.3 * x, 0 * x]), weights, 0.9)
    for found, line in ((intercept, [2.0, 0.0]), (slope, [0.3, 0.0])):
        expected = torch.tensor([line], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_rows_of_a_document_are_drawn_together():
    document = torch.tensor([7, 3, 7, 3, 3, 9])
    drawn = resample(document, 50, seed=4)
    assert torch.equal(drawn, resample(document, 50, seed=4))
    assert not torch.equal(drawn, resample(document, 50, seed=5))
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    assert torch.equal(drawn[:, 1], drawn[:, 4])
    # As many documents as there are, every time.
    assert (drawn[:, [0, 1, 5]].sum(1) == 3).all()


def test_intervals_are_those_of_student():
    values = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:20] = 1e6
    assert float(standard_error(values, 32)) == pytest.approx((32 / 30) ** 0.5, rel=0.05)
    # Tables of Student's t at .975.
    for documents, t in ((8, 2.447), (12, 2.228), (32, 2.042), (1000, 1.962)):
        assert widening(documents) == pytest.approx(t, abs=0.02)


def test_a_sample_of_a_single_length_has_a_line():
    """Few documents may be drawn so; it must not make what is known of the others NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64).repeat(3)
    y = x / 2 + torch.rand(4, 9, generator=generator)
    weights = torch.stack([torch.ones(9), (x == 5).float()])
    for values in quantile_lines(x, y, weights, 0.9):
        assert values.shape == (2, 4)
        assert values.isfinite().all()
