"""What the largest weights keep, against sorting by hand and against `rows_need`."""

import pytest
import torch

from lit_sparse.attention.need import rows_need
from lit_sparse.attention.options import Options
from lit_sparse.recipes.study.inputs import draw, rademacher
from lit_sparse.recipes.study.top_keys import (
    SortedRows,
    collision,
    entropy,
    keys_needed,
    missed_mass,
)

HEADS, N, SCALE = 3, 500, 2.0


@pytest.fixture(scope="module")
def rows():
    return SortedRows.of(draw(rademacher, N, HEADS, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("missed", [0.5, 0.05, 0.001])
def test_keys_needed_are_counted_by_hand(rows, missed):
    found = keys_needed(rows.weights(SCALE), missed)
    for head in range(HEADS):
        weights = sorted((rows.rows.logits[head].double() * SCALE).softmax(0), reverse=True)
        total, count = 0.0, 0
        while total < 1 - missed:
            total, count = total + float(weights[count]), count + 1
        assert found[head] == count


def test_rows_need_agrees(rows):
    """Logits as the products of one-dimensional queries and keys, a head each."""
    keys = rows.rows.logits.T[:, :, None]
    need = rows_need(
        torch.ones_like(keys),
        keys,
        torch.tensor([N - 1]),
        missed=0.05,
        sink=0,
        local=0,
        options=Options(SCALE),
    )
    weights = rows.weights(SCALE)
    assert torch.equal(need.keys[0].long(), keys_needed(weights, 0.05))
    torch.testing.assert_close(need.support[0], entropy(weights).exp())
    torch.testing.assert_close(need.logit_std[0], SCALE * rows.std)


def test_all_keys_are_enough_for_all_of_the_mass():
    weights = torch.full((1, 7), 1 / 7)
    assert keys_needed(weights, 1e-9).item() == 7
    assert missed_mass(weights, 7).item() == 0


def test_missed_mass_and_collisions(rows):
    weights, k = rows.weights(SCALE), 40
    by_hand = (rows.rows.logits.double() * SCALE).softmax(1).sort(1, descending=True).values
    torch.testing.assert_close(missed_mass(weights, k).double(), 1 - by_hand[:, :k].sum(1))
    kept = by_hand[:, :k] / by_hand[:, :k].sum(1, keepdim=True)
    torch.testing.assert_close(collision(weights[:, :k]).double(), kept.square().sum(1))
    assert collision(weights[:, N:]).tolist() == [0] * HEADS


def test_output_errors_are_those_of_attention_over_the_kept_keys(rows):
    values, logits = rows.rows.values.double(), rows.rows.logits.double() * SCALE
    found = rows.output_errors(SCALE, [20, 100, N], rows.rows.values)
    for place, k in enumerate((20, 100, N)):
        top = logits.topk(k, dim=1).indices
        mask = torch.full_like(logits, -torch.inf).scatter_(1, top, 0.0)
        difference = logits.softmax(1) @ values - (logits + mask).softmax(1) @ values
        expected = difference.square().mean(1).sqrt()
        torch.testing.assert_close(found[:, place].double(), expected, atol=1e-6, rtol=1e-4)
