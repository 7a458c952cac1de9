"""No token decides what an earlier one sees: bit for bit, at every place inside a tile."""

import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")

LAWS = {
    "base": Budget(alpha=6.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.0),
    "base and late": Budget(alpha=7.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.4),
    "late": Budget(alpha=6.0, exponent=0.5, floor=0, sink=0, local=0.0, late=1.0),
    "many late": Budget(alpha=0.7, exponent=1.0, floor=0, sink=0, local=0.0, late=1.0),
}


def _visible(selection, document, end):
    """What each of a document's first rows sees: `to_mask`, the rows up to `end`."""
    begin = int(selection.cu_seqlens[document])
    return selection.to_mask()[:, begin : begin + end]


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("tiling", [(8, 8), (4, 16), (16, 4)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("score", ["mass", "exact"])
def test_what_comes_after_p_changes_nothing_up_to_p(law, tiling, heads, score, packed):
    block, tile = tiling
    length, scale = 150, 4.0
    q, k, v = packed(length, *heads, dim=8, scale=scale, dtype=torch.float32)
    others = packed(length, *heads, dim=8, scale=scale, dtype=torch.float32, seed=1)
    options = {"block": block, "tile": tile, "score": score}
    selection = select(q, k, law, **options)
    assert not selection.keeps_everything
    out, lse = sparse_attention(q, k, v, selection, backend="cpu")
    changed_later = 0
    # Every place inside a tile in the middle and inside the last, ragged one.
    for t0 in (128 - 128 % tile - 2 * tile, 150 // tile * tile):
        for p in range(t0, min(t0 + tile, length - 1)):
            q2, k2, v2 = (
                torch.cat([x[: p + 1], y[p + 1 :]]) for x, y in zip((q, k, v), others, strict=True)
            )
            again = select(q2, k2, law, **options)
            assert torch.equal(_visible(again, 0, p + 1), _visible(selection, 0, p + 1))
            out2, lse2 = sparse_attention(q2, k2, v2, again, backend="cpu")
            assert torch.equal(out2[: p + 1], out[: p + 1])
            assert torch.equal(lse2[: p + 1], lse[: p + 1])
            assert not torch.equal(out2[p + 1 :], out[p + 1 :])
            changed_later += not torch.equal(again.columns, selection.columns)
    assert changed_later


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_gradients_flow_from_later_to_earlier_only(law, packed):
    q, k, v = (x.requires_grad_() for x in packed(150, 4, 2, dim=8))
    selection = select(q, k, law, block=8, tile=8)
    out, _ = sparse_attention(q, k, v, selection)
    for p in (70, 77, 149):
        for x, grad in zip((q, k, v), torch.autograd.grad(
            out[p].square().sum(), (q, k, v), retain_graph=True
        ), strict=True):  # fmt: skip
            assert not grad[p + 1 :].any()
            assert grad[p].any()
            assert (x is q) == (not grad[:p].any())


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_other_documents_change_nothing(law, packed):
    lengths = [70, 90, 61]
    cu_seqlens = [0, 70, 160, 221]
    q, k, v = packed(sum(lengths), 4, 2, dim=8, scale=4.0, dtype=torch.float32)
    others = packed(sum(lengths), 4, 2, dim=8, scale=4.0, dtype=torch.float32, seed=1)
    options = {"block": 8, "tile": 8}
    selection = select(q, k, law, cu_seqlens, **options)
    out, _ = sparse_attention(q, k, v, selection, backend="cpu")
    for document in range(3):
        own = slice(cu_seqlens[document], cu_seqlens[document + 1])
        inputs = [y.clone() for y in others]
        for x, y in zip((q, k, v), inputs, strict=True):
            y[own] = x[own]
        again = select(inputs[0], inputs[1], law, cu_seqlens, **options)
        assert torch.equal(again.to_mask()[:, own], selection.to_mask()[:, own])
        assert torch.equal(sparse_attention(*inputs, again, backend="cpu")[0][own], out[own])
        assert not selection.to_mask()[:, own, : own.start].any()
        assert not selection.to_mask()[:, own, own.stop :].any()


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("tiling", [(8, 8), (4, 16), (16, 4)])
def test_a_longer_document_keeps_the_lists_of_its_prefix(law, tiling, packed, lists_of):
    """List rules are nominal: that a document ends changes nothing before the end."""
    block, tile = tiling
    q, k, v = packed(200, 4, 2, dim=8, scale=2.0)
    whole = select(q, k, law, block=block, tile=tile)
    out, _ = sparse_attention(q, k, v, whole, backend="cpu")
    for length in (65, 127, 128, 129, 150):
        part = select(q[:length], k[:length], law, block=block, tile=tile)
        mask = part.to_mask()
        assert torch.equal(mask, whole.to_mask()[:, :length, :length])
        complete = length // tile
        expected = {key: blocks for key, blocks in lists_of(whole).items() if key[2] < complete}
        assert expected.items() <= lists_of(part).items()
        shorter, _ = sparse_attention(q[:length], k[:length], v[:length], part, backend="cpu")
        torch.testing.assert_close(shorter, out[:length], rtol=1e-11, atol=1e-11)


def test_a_decoding_step_is_causal(packed):
    q, k, v = packed(200, 4, 2, dim=8, scale=4.0)
    law = LAWS["base and late"]
    for p in (150, 151, 199):
        step = select(q[p : p + 1], k[: p + 1], law, [0, 1], [0, p + 1], block=8)
        assert step.tile == 1
        assert not step.keeps_everything
        mask = step.to_mask()
        assert mask.shape == (2, 1, p + 1)
        assert mask[..., p].all()
        out, _ = sparse_attention(q[p : p + 1], k[: p + 1], v[: p + 1], step)
        assert out.isfinite().all()
