"""Windows, soft caps and sinks: the CPU backend against the definition, and that against autograd
of the formulas written out.
"""

import pytest
import torch

from lit_sparse.attention import op, reference, select, sparse_attention
from lit_sparse.attention.select import default_tile
from lit_sparse.budget import Budget

TIGHT = Budget(alpha=5.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.3)
DENSE = Budget.dense()
OPTIONS = {
    "window": {"window": 37},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 20, "softcap": 20.0, "sinks": True},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")


def run(attend, q, k, v, sinks=None, **options):
    """Output, lse and the gradients of q, k, v and the sinks under one fixed cotangent."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        options["sinks"] = sinks.detach().clone().to(q.dtype).requires_grad_()
        inputs.append(options["sinks"])
    out, lse = attend(*inputs[:3], **options)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), lse, *torch.autograd.grad(out, inputs, cotangent)]


def written_out(selection, scale):
    """Attention as its formula says, one more column for the sink, which has no value."""

    def attend(q, k, v, window=None, softcap=None, sinks=None):
        groups, rows = q.shape[1] // k.shape[1], torch.arange(len(q))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        logits = scale * torch.einsum("ihd,jhd->hij", q, k)
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        mask = selection.to_mask().repeat_interleave(groups, 0)
        if window is not None:
            mask = mask & (rows[:, None] - rows < window)
        logits = logits.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, len(q), 1)], -1)
        weights = logits.softmax(-1)[..., : len(q)]
        return torch.einsum("hij,jhd->ihd", weights, v), logits.logsumexp(-1).detach().T

    return attend


def drawn(options, heads):
    given = dict(options)
    if given.pop("sinks", False):
        given["sinks"] = torch.linspace(-2, 3, heads, dtype=torch.float64)
    return given


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("scale", "heads"),
    [(1.0, (2, 2)), (16.0, (3, 1)), (4.0, (4, 2)), (1.0, (7, 1)), (16.0, (8, 1))],
)
def test_output_and_gradients_in_float64(options, scale, heads, packed, boundaries):
    lengths = [1, 63, 0, 129]
    q, k, v = packed(sum(lengths), *heads, scale=scale**0.5)
    options = drawn(options, heads[0])
    for budget, block, tile in ((TIGHT, 8, 4), (DENSE, 8, 16)):
        selection = select(q, k, budget, boundaries(lengths), block=block, tile=tile)
        expected = run(written_out(selection, 0.3), q, k, v, **options)
        for backend in ("reference", "cpu"):

            def ours(*x, selection=selection, backend=backend, **given):
                return sparse_attention(*x, selection, 0.3, backend, **given)

            for mine, other in zip(run(ours, q, k, v, **options), expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_error_is_that_of_plain_attention_in_the_same_dtype(options, dtype, scale, packed):
    q, k, v = (x.to(dtype) for x in packed(199, 8, 2, 32, scale=scale**0.5))
    selection = select(q, k, TIGHT, block=8, tile=16)
    options = drawn(options, 8)

    def ours(*x, **given):
        return sparse_attention(*x, selection, 0.2, "cpu", **given)

    wide = [x.double() for x in (q, k, v)]
    exact = run(written_out(selection, 0.2), *wide, **options)
    plain = run(written_out(selection, 0.2), q, k, v, **options)
    names = ["out", "lse", "dq", "dk", "dv", "dsinks"]
    for name, mine, theirs, right in zip(names, run(ours, q, k, v, **options), plain, exact,
                                         strict=False):  # fmt: skip
        size = right.abs().max()
        limit = (2 if name in ("out", "lse") else 3) * (theirs.double() - right).abs().max()
        # Recomputing the weights from the lse costs float32 some bits at large logits.
        slack = 8 * torch.finfo(dtype).eps * size * (scale if dtype == torch.float32 else 1)
        assert (mine.double() - right).abs().max() <= limit + slack, name


def test_two_runs_are_bitwise_equal(packed):
    q, k, v = packed(200, 8, 2, dtype=torch.float32)
    selection = select(q, k, TIGHT, block=8, tile=16)

    def ours(*x, **given):
        return sparse_attention(*x, selection, None, "cpu", **given)

    first, second = (run(ours, q, k, v, **drawn(OPTIONS["all"], 8)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- the selection of a window --


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 65, 200, 1000])
@pytest.mark.parametrize("tile", [1, 16, 64])
def test_a_window_keeps_the_blocks_that_it_needs_and_no_other(window, tile, packed, boundaries):
    lengths = [300, 0, 1, 77]
    q, k, v = packed(sum(lengths), 2, 1)
    cu = boundaries(lengths)
    selection = select(q, k, TIGHT, cu, block=16, tile=tile, window=window)
    rows = torch.arange(len(q))
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    own = document[:, None] == document
    band = own & (rows <= rows[:, None]) & (rows[:, None] - rows < window)
    assert torch.equal(selection.to_mask(window)[0], band)
    offsets, plan = selection.offsets.tolist(), selection.plan
    for t, (d, start) in enumerate(zip(plan.document.tolist(), plan.start.tolist(), strict=True)):
        first = cu[d] + start
        keys = band[first : first + int(plan.rows[t])].any(0).nonzero()[:, 0] - cu[d]
        columns = selection.columns[0, offsets[t] : offsets[t + 1]].tolist()
        # Up to the end of a whole tile, as of all lists: a document may end earlier.
        assert set(columns) == set((keys // 16).tolist())
    expected = reference.attention(q, k, v, band[None])
    for mine, other in zip(
        sparse_attention(q, k, v, selection, window=window), expected, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_a_window_is_no_budget_below_what_is_kept(recwarn, packed):
    q, k, _ = packed(300, 2, 1)
    selection = select(q, k, Budget.fixed(8, sink=40), block=16, tile=16, window=20)
    assert not recwarn.list
    assert not selection.plan.chooses
    with pytest.raises(ValueError, match="window must be None or a positive number of keys, got 0"):
        select(q, k, TIGHT, window=0)


def test_cached_keys_within_a_window(packed):
    """A decoding step that has its whole past, and one whose cache dropped what lies before."""
    q, k, v = packed(120, 4, 2)
    _, expected = sparse_attention(
        q, k, v, select(q, k, DENSE, block=16, tile=16, window=33), window=33
    )
    for keys in (120, 33):
        step = select(q[-1:], k[-keys:], DENSE, [0, 1], [0, keys], block=16, window=33)
        _, lse = sparse_attention(q[-1:], k[-keys:], v[-keys:], step, window=33)
        torch.testing.assert_close(lse, expected[-1:], rtol=1e-10, atol=1e-10)


def test_a_window_that_reaches_everywhere_runs_densely(packed, monkeypatch):
    def dense(*args):
        raise LookupError("dense")

    monkeypatch.setattr(op.dense, "dense_attention", dense)
    q, k, v = packed(100, 4, 2)
    for window, runs in ((100, True), (99, False)):
        selection = select(q, k, DENSE, [0, 100], window=window, tile=default_tile(2))
        if runs:
            with pytest.raises(LookupError):
                sparse_attention(q, k, v, selection, window=window)
        else:
            sparse_attention(q, k, v, selection, window=window)
