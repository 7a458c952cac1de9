"""Losses by position against the full logits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_sparse.evaluation import position_loss, position_ranges


@pytest.mark.parametrize(
    ("length", "longest", "ranges"),
    [
        (4096, None, [0, 512, 1024, 2048, 4096]),
        (3000, None, [0, 512, 1024, 2048, 3000]),
        (512, None, [0, 128, 256, 512]),
        (512, 4096, [0, 512]),
        (1024, 512, [0, 128, 256, 512, 1024]),
        (3, None, [0, 1, 2, 3]),
        (2, None, [0, 1, 2]),
    ],
)
def test_ranges_are_powers_of_two(length, longest, ranges):
    assert position_ranges(length, longest) == ranges


def test_sums_are_those_of_the_full_logits(model):
    texts = torch.randint(257, (3, 200), generator=torch.Generator().manual_seed(1))
    ranges = position_ranges(200)
    found = position_loss(model, texts, ranges)
    with torch.no_grad():
        logits = model(texts).logits[:, :-1]
    # Of the token at position p, which p others stand before.
    losses = F.cross_entropy(logits.mT, texts[:, 1:], reduction="none").double()
    losses = torch.cat([torch.zeros(3, 1), losses], 1).numpy()
    assert found.parts == [(0, 64), (64, 128), (128, 200)]
    np.testing.assert_allclose(found.of_texts(0, 64), losses[:, 1:64].mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.of_texts(64, 128), losses[:, 64:128].mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.of_texts(128, 200), losses[:, 128:].mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.late, losses[:, 150:].mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.of_texts(), losses[:, 1:].mean(1), rtol=1e-5)


def test_the_shortest_text_has_one_token_to_predict(model):
    text = torch.tensor([[5, 9]])
    with torch.no_grad():
        expected = -model(text).logits[0, 0].log_softmax(-1)[9]
    found = position_loss(model, text, position_ranges(2))
    assert found.of_texts()[0] == pytest.approx(float(expected), rel=1e-5)
