"""The definition of the attention against PyTorch's own, in float64."""

import pytest
import torch

from lit_sparse.attention import reference, select, sparse_attention
from lit_sparse.budget import Budget

TIGHT = Budget.fixed(24, sink=4, local=0.1, late=0.3)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equals_sdpa_under_the_dense_mask(heads, scale, packed, masked_sdpa, with_grads):
    q, k, v = packed(90, *heads, scale=scale)
    selection = select(q, k, TIGHT, [0, 50, 50, 90], block=4, tile=4)
    assert not selection.keeps_everything
    mask = selection.to_mask()
    for factor in (None, 0.3):
        ours = with_grads(lambda *x: reference.attention(*x, selection, factor)[0], q, k, v)  # noqa: B023
        theirs = with_grads(lambda *x: masked_sdpa(*x, mask, factor), q, k, v)  # noqa: B023
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_lse_is_the_log_of_the_kept_weights(packed):
    q, k, v = packed(40, 2, 1)
    selection = select(q, k, TIGHT, block=4, tile=4)
    _, lse = reference.attention(q, k, v, selection, 0.5)
    mask = selection.to_mask()[0]
    for row in (0, 13, 39):
        for head in range(2):
            weights = (0.5 * k[mask[row], 0] @ q[row, head]).exp()
            assert lse[row, head] == pytest.approx(weights.sum().log().item(), rel=1e-12)
    assert lse.shape == (40, 2)
    assert lse.dtype == torch.float64


def test_a_row_without_keys_gives_zero_and_minus_infinity(packed):
    q, k, v = (x.requires_grad_() for x in packed(6, 2, 1))
    mask = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    mask[0, 2] = False
    out, lse = reference.attention(q, k, v, mask)
    assert (out[2] == 0).all()
    assert (lse[2] == float("-inf")).all()
    assert lse[[0, 1, 3, 4, 5]].isfinite().all()
    out.square().sum().backward()
    assert (q.grad[2] == 0).all()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert (x.grad != 0).any()


def test_masks_by_key_value_head_by_query_head_or_for_all(packed):
    q, k, v = packed(12, 4, 2)
    by_kv = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    by_kv |= torch.eye(12, dtype=torch.bool)
    out = reference.attention(q, k, v, by_kv)[0]
    by_head = reference.attention(q, k, v, by_kv.repeat_interleave(2, 0))[0]
    assert torch.equal(out, by_head)
    for_all = reference.attention(q, k, v, by_kv[:1])[0]
    assert torch.equal(for_all[:, :2], out[:, :2])
    assert not torch.equal(for_all[:, 2:], out[:, 2:])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[12], [5, 0, 9]])
def test_gradcheck(backend, lengths, packed, boundaries):
    q, k, v = (x.requires_grad_() for x in packed(sum(lengths), 2, 1, dim=3))
    budget = Budget.fixed(8, sink=2, local=0.0, late=0.5)
    selection = select(q, k, budget, boundaries(lengths), block=2, tile=2)
    assert not selection.keeps_everything

    def attend(*inputs):
        return sparse_attention(*inputs, selection, scale=0.8, backend=backend)[0]

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_topk_attention_by_brute_force(packed):
    q, k, v = packed(30, 4, 2, scale=2.0)
    for budget in (5, Budget(alpha=2.0, exponent=0.5, floor=0)):
        out, lse = reference.topk_attention(q, k, v, budget, scale=0.4)
        for row in range(30):
            for head in range(4):
                logits = 0.4 * (k[: row + 1, head // 2] @ q[row, head])
                count = min(5, row + 1) if budget == 5 else budget(row + 1)
                top = sorted(range(row + 1), key=lambda i: -logits[i])[:count]
                weights = logits[top].softmax(0)
                expected = weights @ v[top, head // 2]
                torch.testing.assert_close(out[row, head], expected, rtol=1e-11, atol=1e-11)
                torch.testing.assert_close(lse[row, head], logits[top].logsumexp(0))


def test_topk_attention_breaks_ties_low_and_is_differentiable(packed):
    q, k, v = packed(6, 1, 1, dim=4)
    out, _ = reference.topk_attention(torch.zeros_like(q), k, v, 2)
    torch.testing.assert_close(out[5, 0], v[:2, 0].mean(0))
    v.requires_grad_()
    reference.topk_attention(q, k, v, 100)[0].sum().backward()
    torch.testing.assert_close(v.grad.sum(), torch.tensor(24.0, dtype=torch.float64))
