"""sparse_attention(): the CPU backend and the dense fallback against the definition."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import lit_sparse.attention.op as op
from lit_sparse.attention import Selection, reference, select, sparse_attention
from lit_sparse.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")

TIGHT = Budget(alpha=5.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.3)
DENSE = Budget.dense()

LENGTHS = {
    "1": [1],
    "63": [63],
    "64": [64],
    "65": [65],
    "127": [127],
    "129": [129],
    "300": [300],
    "ragged": [0, 129, 0, 65, 1, 0],
    "aligned": [64, 128],
    "nothing": [0, 0],
}


def _attend(selection, backend="cpu", scale=None):
    return lambda q, k, v: sparse_attention(q, k, v, selection, scale, backend)[0]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (3, 1), (8, 2), (7, 1), (8, 1)])
def test_every_shape_in_float64(lengths, heads, packed, boundaries, with_grads):
    q, k, v = packed(sum(lengths), *heads, scale=2.0)
    for block, tile in ((8, 4), (4, 16), (8, 8)):
        selection = select(q, k, TIGHT, boundaries(lengths), block=block, tile=tile)
        ours = with_grads(_attend(selection, "cpu", 0.4), q, k, v)
        theirs = with_grads(_attend(selection, "reference", 0.4), q, k, v)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
        lse = sparse_attention(q, k, v, selection, 0.4, "cpu")[1]
        expected = reference.attention(q, k, v, selection, 0.4)[1]
        torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 16, 24, 64, 96])
def test_head_dimensions(dim, packed, with_grads):
    q, k, v = packed(100, 4, 2, dim)
    selection = select(q, k, TIGHT, [0, 30, 100], block=8, tile=8)
    assert not selection.keeps_everything
    ours = with_grads(_attend(selection), q, k, v)
    theirs = with_grads(_attend(selection, "reference"), q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", ["cpu", None])
def test_error_is_that_of_plain_attention_in_the_same_dtype(
    dtype, scale, budget, backend, packed, masked_sdpa, with_grads
):
    """At most twice (out) or three times (gradients) as far from the exact result.

    Recomputing the weights from the lse, as flash kernels do, costs float32 some bits at large
    logits: its gradients are also measured by those of PyTorch's own flash kernel.
    """
    q, k, v = packed(200, 4, 2, 32, scale=scale, dtype=dtype)
    selection = select(q, k, budget, [0, 75, 200], block=8, tile=8)
    mask = selection.to_mask()
    flash = with_grads(lambda *x: masked_sdpa(*x, mask), q, k, v)
    exact = with_grads(_plain(mask), *(x.double() for x in (q, k, v)))
    plain = with_grads(_plain(mask), q, k, v)
    ours = with_grads(_attend(selection, backend), q, k, v)
    for i, (name, allowed) in enumerate((("out", 2), ("dq", 3), ("dk", 3), ("dv", 3))):
        error, yardstick, fast = (
            ((x[i].double() - exact[i]).norm() / exact[i].norm()).item()
            for x in (ours, plain, flash)
        )
        if dtype == torch.float32 and name != "out":
            yardstick = max(yardstick, fast)
        assert ours[i].dtype == dtype
        assert error <= allowed * yardstick, f"{name}: {error:.2e}, plain {yardstick:.2e}"


def _plain(mask):
    """Attention as a user would write it, all in the dtype of its inputs."""

    def attend(q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        logits = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~mask.repeat_interleave(groups, 0), float("-inf"))
        return (logits.softmax(-1) @ v).transpose(0, 1)

    return attend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_lse_of_every_path(dtype, budget, backend, packed):
    q, k, v = packed(150, 4, 2, scale=2.0, dtype=dtype)
    selection = select(q, k, budget, [0, 40, 150], block=8, tile=8)
    out, lse = sparse_attention(q, k, v, selection, backend=backend)
    exact = reference.attention(q.double(), k.double(), v.double(), selection)[1]
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert lse.shape == (150, 4)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Products of inputs of any dtype are summed in float32 at least.
    torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=2e-4)


def test_default_backend_runs_the_sparse_path_and_the_default_scale(packed):
    q, k, v = packed(150, 4, 2)
    selection = select(q, k, TIGHT, block=8, tile=8)
    assert not selection.keeps_everything
    expected = sparse_attention(q, k, v, selection, 16**-0.5, "cpu")
    for mine, other in zip(sparse_attention(q, k, v, selection), expected, strict=True):
        assert torch.equal(mine, other)


def test_to_mask_given_to_sdpa_reproduces_output_and_gradients(packed, masked_sdpa, with_grads):
    q, k, v = packed(200, 6, 2, scale=3.0)
    selection = select(q, k, TIGHT, [0, 75, 75, 200], block=8, tile=16)
    mask = selection.to_mask()
    ours = with_grads(_attend(selection), q, k, v)
    theirs = with_grads(lambda *x: masked_sdpa(*x, mask), q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("lengths", [[130], [64, 64, 64, 7, 7], [0, 33, 0, 1], [0]])
def test_everything_kept_is_causal_attention(
    backend, lengths, packed, boundaries, masked_sdpa, with_grads
):
    q, k, v = packed(sum(lengths), 4, 2, scale=2.0)
    selection = select(q, k, DENSE, boundaries(lengths), block=8, tile=8)
    assert selection.keeps_everything
    blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in lengths]
    dense = torch.block_diag(*blocks).bool()[None].expand(2, -1, -1)
    assert torch.equal(selection.to_mask(), dense)
    ours = with_grads(_attend(selection, backend), q, k, v)
    theirs = with_grads(lambda *x: masked_sdpa(*x, dense), q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_the_dense_fallback_is_taken_by_lengths_alone(packed, monkeypatch):
    def dense(*args):
        raise LookupError("dense")

    monkeypatch.setattr(op.dense, "dense_attention", dense)
    q, k, v = packed(100, 4, 2)
    everything = select(q, k, Budget(), block=8, tile=8)
    with pytest.raises(LookupError):
        sparse_attention(q, k, v, everything)
    sparse_attention(q, k, v, everything, backend="cpu")
    sparse_attention(q, k, v, select(q, k, TIGHT, block=8, tile=8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_selection_of_the_diagonal_alone(backend, packed, masked_sdpa, with_grads):
    q, k, v = packed(64, 4, 2)
    full = select(q, k, Budget.fixed(8, sink=0, local=0.0, late=0.0), block=8, tile=8)
    # Lists as short as the rules allow, with every block but the tile's own hidden from its rows.
    diagonal = full.columns * 8 == torch.from_numpy(full.plan.start).int()[full.slot_tile]
    selection = _hidden_unless(full, diagonal)
    rows = torch.arange(64)
    mask = (rows[:, None] // 8 == rows // 8) & (rows <= rows[:, None])
    assert torch.equal(selection.to_mask(), mask.expand(2, -1, -1))
    ours = with_grads(_attend(selection, backend), q, k, v)
    theirs = with_grads(lambda *x: masked_sdpa(*x, mask.expand(2, -1, -1)), q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def _hidden_unless(selection, keep):
    """The selection with all its slots moved to the late part and those not kept emptied."""
    counts = selection.plan.counts.copy()
    counts[:, 3] += counts[:, :3].sum(1)
    counts[:, :3] = 0
    return Selection(
        replace(selection.plan, counts=counts),
        torch.where(keep, selection.columns, -1),
        torch.where(keep, selection.entry, selection.tile),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("keys", [24, 40, 64])
def test_sliding_window(backend, keys, packed, masked_sdpa, with_grads):
    q, k, v = packed(150, 4, 2)
    budget = Budget.fixed(keys, sink=0, local=1.0)
    selection = select(q, k, budget, block=8, tile=8)
    rows = torch.arange(150)
    first_key = (rows // 8 * 8 - max(keys, 16)).clamp(min=0) // 8 * 8
    mask = (rows >= first_key[:, None]) & (rows <= rows[:, None])
    assert torch.equal(selection.to_mask(), mask.expand(2, -1, -1))
    ours = with_grads(_attend(selection, backend), q, k, v)
    theirs = with_grads(lambda *x: masked_sdpa(*x, mask.expand(2, -1, -1)), q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


CACHED = {
    "one query": ([1], [200]),
    "one query each": ([1, 0, 1], [129, 30, 90]),
    "several queries": ([19, 0, 33], [150, 7, 140]),
    "mixed": ([40, 5], [40, 170]),
}


@pytest.mark.parametrize(("lengths", "key_lengths"), CACHED.values(), ids=CACHED.keys())
@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", ["cpu", None])
def test_cached_keys(
    lengths, key_lengths, budget, backend, packed, boundaries, masked_sdpa, with_grads
):
    q, k, v = packed(sum(lengths), 4, 2, keys=sum(key_lengths))
    cu, cu_k = boundaries(lengths), boundaries(key_lengths)
    selection = select(q, k, budget, cu, cu_k, block=8, tile=8)
    mask = selection.to_mask()
    for document, (queries, keys) in enumerate(zip(lengths, key_lengths, strict=True)):
        own = mask[:, cu[document] : cu[document + 1], cu_k[document] : cu_k[document + 1]]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        assert own.sum() == mask[:, cu[document] : cu[document + 1]].sum()
        assert not (own & ~causal).any()
        if budget is DENSE:
            assert torch.equal(own, causal.expand_as(own))
    ours = with_grads(_attend(selection, backend), q, k, v)
    theirs = with_grads(lambda *x: masked_sdpa(*x, mask), q, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
def test_inputs_and_cotangents_of_any_layout(budget, packed):
    q, k, v = packed(100, 4, 2)
    selection = select(q, k, budget, [0, 37, 100], block=8, tile=8)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    assert torch.equal(select(views[0], views[1], budget, [0, 37, 100], block=8, tile=8).columns,
                       selection.columns)  # fmt: skip
    results = []
    for inputs in ((q, k, v), views):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = sparse_attention(*inputs, selection)[0]
        contiguous = torch.ones_like(out).contiguous()
        by_sum = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        by_ones = torch.autograd.grad(out, inputs, contiguous, retain_graph=True)
        strided = contiguous.transpose(0, 2).contiguous().transpose(0, 2)
        by_strided = torch.autograd.grad(out, inputs, strided)
        results.append((out, *by_sum))
        for expanded, plain, odd in zip(by_sum, by_ones, by_strided, strict=True):
            torch.testing.assert_close(expanded, plain, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(odd, plain, rtol=1e-12, atol=1e-12)
    for plain, viewed in zip(*results, strict=True):
        torch.testing.assert_close(viewed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
def test_gradients_of_some_inputs_only(backend, budget, packed):
    q, k, v = packed(70, 4, 2)
    selection = select(q, k, budget, block=8, tile=8)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(_attend(selection, backend)(*inputs).square().sum(), inputs)
    for wanted in ((0,), (1,), (2,), (0, 2)):
        inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
        _attend(selection, backend)(*inputs).square().sum().backward()
        for i, x in enumerate(inputs):
            if i in wanted:
                torch.testing.assert_close(x.grad, expected[i], rtol=1e-12, atol=1e-12)
            else:
                assert x.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
def test_lse_is_not_differentiable_and_second_derivatives_are_refused(backend, budget, packed):
    q, k, v = (x.requires_grad_() for x in packed(70, 4, 2))
    selection = select(q, k, budget, block=8, tile=8)
    out, lse = sparse_attention(q, k, v, selection, backend=backend)
    assert out.requires_grad
    assert not lse.requires_grad
    if backend == "cpu":
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dq.sum().backward()


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 2)])
def test_the_backward_leaves_everything_as_it_was(heads, packed):
    """Aligned lengths and one head make views of what is a copy elsewhere."""
    q, k, v = (x.requires_grad_() for x in packed(128, *heads))
    selection = select(q, k, TIGHT, block=8, tile=8)
    out, lse = sparse_attention(q, k, v, selection)
    cotangent = torch.ones_like(out)
    kept = [q, k, v, out, lse, cotangent, selection.columns, selection.entry]
    before = [x.detach().clone() for x in kept]
    first = torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), cotangent)
    for one, other in zip((*first, *before), (*second, *kept), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_no_rows_at_all(backend, packed):
    q, k, v = (x.requires_grad_() for x in packed(0, 4, 2))
    for cu_seqlens in ([0], [0, 0, 0], None):
        selection = select(q, k, TIGHT, cu_seqlens, block=8, tile=8)
        out, lse = sparse_attention(q, k, v, selection, backend=backend)
        assert out.shape == (0, 4, 16)
        assert lse.shape == (0, 4)
        assert lse.dtype == torch.float64
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert grad.numel() == 0


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("budget", [TIGHT, DENSE], ids=["sparse", "dense"])
def test_autocast_changes_nothing(backend, budget, packed):
    """Inputs keep their precision: autocast may not round the products inside to bfloat16."""
    q, k, v = (x.requires_grad_() for x in packed(400, 4, 2, scale=2.0, dtype=torch.float32))
    results = []
    for enabled in (False, True):
        cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
        with cast:
            selection = select(q, k, budget, [0, 50, 400], block=4, tile=8)
            out, lse = sparse_attention(q, k, v, selection, backend=backend)
        # The plain operations of the reference are autograd's own in the backward.
        with cast if backend != "reference" else nullcontext():
            grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        results.append((selection.columns, selection.entry, out, lse, *grads))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("heads", [(4, 2), (2, 1)])
def test_inference_mode_leaves_nothing_behind_that_training_trips_over(heads, packed):
    q, k, v = packed(150, *heads, dtype=torch.float32)
    options = {"block": 8, "tile": 8}
    # A law that no other test uses, so that its plan is made in inference mode.
    budget = Budget(alpha=5.125 + heads[1], exponent=0.5, floor=0, sink=8, local=0.1, late=0.3)
    with torch.inference_mode():
        inside = select(q, k, budget, **options)
        expected = sparse_attention(q, k, v, inside)[0].clone()
    q.requires_grad_()
    for selection in (select(q, k, budget, **options), inside):
        out, _ = sparse_attention(q, k, v, selection)
        assert torch.equal(out, expected)
        out.sum().backward()
