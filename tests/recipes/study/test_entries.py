"""Statistics of what enters attention, against brute force."""

import numpy as np
import pytest
import torch

from lit_sparse.recipes.study.entries import Entries, dimension_share, normal_largest, token_cosine


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_entries_are_those_of_all_texts_together():
    texts = [1 + _drawn(1, 30, 8, seed=1) ** 3, _drawn(1, 50, 8, seed=2)]
    entries = Entries()
    for text in texts:
        entries.add(text)
    every = torch.cat([text.flatten() for text in texts])
    away = every - every.mean()
    kurtosis = away.pow(4).mean() / away.square().mean() ** 2 - 3
    assert entries.excess_kurtosis == pytest.approx(kurtosis.item())
    largest = every.abs().max() / every.square().mean().sqrt()
    assert entries.largest_over_rms == pytest.approx(largest.item())
    cosines = [token_cosine(text[0]) for text in texts]
    assert entries.token_cosine == pytest.approx(np.mean(cosines))


def test_token_cosine_is_the_mean_over_pairs():
    x = _drawn(7, 5) + 1
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(7) for j in range(7) if i != j]
    assert token_cosine(x) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("tokens", [40, 400])
def test_independent_entries_have_all_dimensions_and_shared_ones_few(tokens):
    independent = _drawn(tokens, 64)
    assert dimension_share(independent) == pytest.approx(1, abs=0.1)
    assert dimension_share(independent[:, :1] * _drawn(64, seed=3)) < 0.05


def test_normal_entries_are_as_large_as_is_said():
    entries = Entries()
    entries.add(_drawn(1, 2000, 64))
    assert entries.largest_over_rms == pytest.approx(normal_largest(entries), rel=0.15)
    assert abs(entries.excess_kurtosis) < 0.1
