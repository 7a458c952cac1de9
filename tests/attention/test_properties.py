"""What holds for any selection and any backend: repeatability, packing, budgets, odd inputs."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.*below what is always kept")

TIGHT = Budget(alpha=6.0, exponent=0.5, floor=0, sink=8, local=0.1, late=0.3)
LENGTHS = [129, 0, 65, 200, 1, 63]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(threads, dtype, packed, boundaries, with_grads):
    torch.set_num_threads(threads)
    lengths = [129, 0, 95]
    q, k, v = packed(sum(lengths), 4, 2, dim=32, scale=4.0, dtype=dtype)
    runs = []
    for _ in range(3):
        selection = select(q, k, TIGHT, boundaries(lengths), block=8, tile=16)
        results = with_grads(lambda *x: sparse_attention(*x, selection)[0], q, k, v)  # noqa: B023
        lse = sparse_attention(q, k, v, selection)[1]
        runs.append([selection.columns, selection.entry, lse, *results])
    for again in runs[1:]:
        for one, other in zip(runs[0], again, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("threads", "tiling"), [(1, (8, 8)), (2, (8, 8)), (1, (16, 4)), (1, (4, 32))]
)
@pytest.mark.parametrize("score", ["mass", "mean", "variance", "minmax", "exact"])
def test_a_document_selects_the_same_alone_and_packed(
    threads, tiling, score, packed, boundaries, lists_of
):
    torch.set_num_threads(threads)
    block, tile = tiling
    q, k, v = packed(sum(LENGTHS), 4, 2, dim=16, scale=4.0, dtype=torch.float32)
    cu_seqlens = boundaries(LENGTHS)
    options = {"block": block, "tile": tile, "score": score}
    together = select(q, k, TIGHT, cu_seqlens, **options)
    lists = lists_of(together)
    out, lse = sparse_attention(q, k, v, together)
    for document, (begin, end) in enumerate(pairwise(cu_seqlens)):
        own = [x[begin:end] for x in (q, k, v)]
        alone = select(*own[:2], TIGHT, **options)
        expected = {(h, t): x for (d, h, t), x in lists.items() if d == document}
        assert {(h, t): x for (_, h, t), x in lists_of(alone).items()} == expected
        out_alone, lse_alone = sparse_attention(*own, alone)
        torch.testing.assert_close(out_alone, out[begin:end], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse_alone, lse[begin:end], rtol=2e-5, atol=2e-5)


LAWS = {
    "default shares": Budget(alpha=6.0, exponent=0.5, floor=0, sink=8),
    "wide": Budget(alpha=0.5, exponent=1.0, floor=40, sink=0, local=0.5, late=1.0),
    "ceiling": Budget(alpha=20.0, exponent=0.5, floor=0, ceiling=100, sink=16, local=0.3),
    "fixed": Budget.fixed(60, sink=4, local=0.0, late=0.2),
    "under the minimum": Budget.fixed(3, sink=8, local=0.0),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("tiling", [(8, 8), (16, 4), (4, 32)])
def test_the_budget_is_respected(law, tiling, packed):
    """Lists hold K blocks, and no row executes more than K * block keys."""
    block, tile = tiling
    q, k, _ = packed(400, 4, 2, dim=8, scale=3.0)
    selection = select(q, k, law, block=block, tile=tile)
    rows = selection.to_mask().sum(-1)
    for t, size in enumerate(selection.offsets.diff().tolist()):
        n = (t + 1) * tile
        window = max(int(np.ceil(round(law.local * max(law(n) - law.sink, 0), 6))), tile + block)
        sink = set(range(-(-law.sink // block)))
        local = set(range(max(t * tile - window, 0) // block, -(-n // block)))
        visible = -(-n // block)
        always = len({b for b in sink | local if b < visible})
        expected = min(max(-(-law(n) // block), always), visible)
        assert size == min(expected, -(-min(n, 400) // block) + expected - visible)
        assert (rows[:, t * tile : n] <= expected * block).all()
        # Every row sees itself and at least the block and tile before it.
        at = torch.arange(t * tile, min(n, 400))
        assert (rows[:, at] >= torch.minimum(at + 1, torch.tensor(block + 1))).all()


def test_list_lengths_do_not_depend_on_data(packed, boundaries):
    cu_seqlens = boundaries(LENGTHS)
    plans = []
    for seed, scale in ((0, 1.0), (1, 16.0), (2, 0.0)):
        q, k, _ = packed(sum(LENGTHS), 4, 2, scale=scale, seed=seed)
        selection = select(q, k, TIGHT, cu_seqlens, block=8, tile=8)
        plans.append((selection.offsets.tolist(), selection.columns.shape, selection.plan.counts))
    assert plans[0][:2] == plans[1][:2] == plans[2][:2]
    assert (plans[0][2] == plans[1][2]).all()


@pytest.mark.parametrize("heads", [(4, 2), (2, 1)])
def test_the_selection_carries_no_gradient_and_leaves_its_inputs_alone(heads, packed):
    q, k, v = packed(200, *heads)
    expected = select(q, k, TIGHT, block=8, tile=8)
    before = [x.clone() for x in (q, k, v)]
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    for score in ("mass", "mean", "variance", "minmax", "exact"):
        selection = select(inputs[0], inputs[1], TIGHT, block=8, tile=8, score=score)
        assert not selection.columns.requires_grad
        assert not selection.entry.requires_grad
        if score == "mass":
            assert torch.equal(selection.columns, expected.columns)
        out, _ = sparse_attention(*inputs, selection)
        out.sum().backward()
        for x, y in zip(inputs, before, strict=True):
            assert torch.equal(x.detach(), y)
    assert torch.is_grad_enabled()


def test_checkpointing_runs_it_twice_to_the_same_gradients(packed):
    from torch.utils.checkpoint import checkpoint

    def layer(q, k, v):
        return sparse_attention(q, k, v, select(q, k, TIGHT, block=8, tile=8))[0]

    grads = []
    for checkpointed in (False, True):
        inputs = [x.requires_grad_() for x in packed(200, 4, 2, dtype=torch.float32)]
        out = checkpoint(layer, *inputs, use_reentrant=False) if checkpointed else layer(*inputs)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("score", ["mass", "mean", "variance", "minmax", "exact"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("into", ["q", "k"])
def test_broken_inputs_give_well_formed_lists(score, bad, into, packed, lists_of):
    q, k, _ = packed(200, 4, 2, dtype=torch.float32)
    sizes = select(q, k, TIGHT, block=8, tile=8).offsets
    broken = {"q": q, "k": k}
    for positions in ([20], [100, 101, 199], list(range(200))):
        x = broken[into].clone()
        x[positions] = bad
        selection = select(**{**broken, into: x}, budget=TIGHT, block=8, tile=8, score=score)
        assert torch.equal(selection.offsets, sizes)
        lists = lists_of(selection)  # in range, none twice
        for (_, _, tile), blocks in lists.items():
            columns = [b for b, _ in blocks]
            assert columns[-1] == tile
            assert columns[0] == 0
            full = int(selection.plan.full[tile])
            assert len(columns) > full


def test_a_broken_row_has_no_say_and_the_others_decide(packed):
    q, k, _ = packed(200, 2, 1, scale=3.0)
    clean = select(q, k, TIGHT, block=8, tile=8)
    silent, broken = q.clone(), q.clone()
    # A row of zeros spreads its mass evenly: it changes no ranking.
    for row in (101, 120, 144, 150, 171):
        silent[row], broken[row] = 0, float("nan")
    expected = select(silent, k, TIGHT, block=8, tile=8)
    assert not torch.equal(clean.columns, expected.columns)
    found = select(broken, k, TIGHT, block=8, tile=8)
    assert torch.equal(found.columns, expected.columns)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), float("-inf")])
def test_lists_are_well_formed_whatever_a_callable_scores(worst, packed, lists_of):
    q, k, _ = packed(200, 2, 1)

    def score(q, blocks, hidden, scale):
        scores = torch.zeros(*q.shape[:2], blocks.shape[1], dtype=q.dtype)
        scores[..., ::2] = worst
        return scores

    selection = select(q, k, TIGHT, block=8, tile=8, score=score)
    for (_, _, tile), blocks in lists_of(selection).items():  # in range, none twice
        assert len(blocks) >= len(range(int(selection.plan.full[tile]))) + 1
    everywhere, nowhere = (
        select(q, k, TIGHT, block=8, tile=8, score=lambda *x: score(*x).fill_(value))  # noqa: B023
        for value in (worst, 0.0)
    )
    assert lists_of(everywhere) == lists_of(nowhere)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("into", [0, 1, 2])
def test_nan_shows_in_the_rows_that_see_it(backend, into, packed):
    inputs = list(packed(200, 4, 2, dtype=torch.float32))
    selection = select(*inputs[:2], TIGHT, [0, 100, 200], block=8, tile=8)
    clean, _ = sparse_attention(*inputs, selection, backend=backend)
    assert clean.isfinite().all()
    inputs[into] = inputs[into].clone()
    inputs[into][130, 0] = float("nan")
    out, _ = sparse_attention(*inputs, selection, backend=backend)
    if into == 0:
        assert out[130, 0].isnan().all()
        assert torch.equal(out[:130], clean[:130])
        assert torch.equal(out[131:], clean[131:])
    else:
        sees = selection.to_mask()[0, :, 130]
        assert sees.sum() > 8
        assert out[sees, :2].isnan().all()
        assert torch.equal(out[:, 2:], clean[:, 2:])
        if backend == "cpu":
            # Nothing of it reaches another document or an earlier tile (100 + 3 * 8).
            assert torch.equal(out[:124], clean[:124])


def test_the_import_brings_no_model_and_no_trainer():
    code = (
        "import sys, lit_sparse.attention; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('transformers', 'lightning', 'pytorch_lightning', 'deepspeed', 'tokenizers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
