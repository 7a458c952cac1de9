"""Forward and backward against the definition, over a pairwise cover of all that they take."""

import random
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from lit_sparse.attention import Selection, select, sparse_attention
from lit_sparse.attention.triton import backend, config
from lit_sparse.attention.triton.work import make_work
from lit_sparse.budget import Budget

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below what is always kept"),
    # The interpreter's arrays warn of infinities that the kernels mean.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SPARSE = Budget(alpha=5.0, exponent=0.5, floor=0, sink=16, local=0.1, late=0.3)

PARAMETERS = {
    "lengths": [[1], [63], [64], [65], [127], [129], [0, 50, 0, 33, 1, 0]],
    "heads": [(2, 2), (3, 1), (4, 1), (7, 1), (8, 1), (16, 1)],
    "dim": [16, 64, 96, 128, 256],
    "grid": [(16, 16), (16, 8), (16, 64), (32, 16), (64, 32), (128, 16)],
    "scale": [1.0, 4.0, 16.0],
    "dtype": ["full", "half"],
    "budget": ["sparse", "everything", "sliding", "diagonal"],
    "options": ["plain", "window", "softcap", "sinks", "all"],
    "tma": [True, False],
    "items": ["whole", "cut"],
}
BUDGETS = {
    "sparse": SPARSE,
    "everything": Budget.dense(),
    "sliding": Budget.fixed(40, sink=0, local=1.0),
    "diagonal": SPARSE,
}
OPTIONS = {
    "plain": {},
    "window": {"window": 20},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 50, "softcap": 20.0, "sinks": True},
}


def pairwise(parameters, seed=0, tries=60):
    """Cases in which every two values of any two parameters meet: greedily, from random tries."""
    generator = random.Random(seed)
    names = list(parameters)
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i, j in product(range(len(parameters[a])), range(len(parameters[b])))
    }

    def draw(pair):
        case = {name: generator.randrange(len(parameters[name])) for name in names} | dict(pair)
        return case, set(combinations(case.items(), 2)) & missing

    cases = []
    while missing:
        pair = min(missing)
        case, covered = max((draw(pair) for _ in range(tries)), key=lambda drawn: len(drawn[1]))
        missing -= covered
        cases.append({name: parameters[name][case[name]] for name in names})
    return cases


COVER = pairwise(PARAMETERS)


def test_the_cover_covers():
    assert len(COVER) <= 150
    for a, b in combinations(PARAMETERS, 2):
        met = [(case[a], case[b]) for case in COVER]
        assert all(pair in met for pair in product(PARAMETERS[a], PARAMETERS[b]))


def _name(case):
    return "-".join(str(value).replace(" ", "") for value in case.values())


@pytest.mark.parametrize("case", COVER, ids=_name)
def test_cover(case, draw, device, half, monkeypatch):
    check(case, draw, device, half, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("budget", PARAMETERS["budget"])
@pytest.mark.parametrize("dtype", PARAMETERS["dtype"])
@pytest.mark.parametrize("heads", PARAMETERS["heads"], ids=str)
def test_product(heads, dtype, budget, draw, device, half, monkeypatch):
    """Everything that DESIGN asks for, multiplied out."""
    fixed = {"heads": heads, "dtype": dtype, "budget": budget, "tma": True, "items": "cut"}
    for lengths, scale in product(PARAMETERS["lengths"], PARAMETERS["scale"]):
        for dim, grid, options in ((16, (16, 16), "all"), (64, (16, 8), "plain")):
            case = {"lengths": lengths, "scale": scale, "dim": dim, "grid": grid}
            check(case | fixed | {"options": options}, draw, device, half, monkeypatch)


def check(case, draw, device, half, monkeypatch):
    """Output, lse and gradients: at most twice (out) or three times (gradients) as far from the
    exact result as plain attention in the same dtype.
    """
    lengths, (hq, hkv), (block, tile) = case["lengths"], case["heads"], case["grid"]
    # A GPU computes in half precision only.
    dtype = half if case["dtype"] == "half" or device == "cuda" else torch.float32
    if not case["tma"]:
        monkeypatch.setattr(backend, "describable", lambda *tensors: False)
    if case["items"] == "cut":
        monkeypatch.setattr(backend, "make_work", lambda selection: make_work(selection, 2))
    q, k, v = draw(sum(lengths), hq, hkv, case["dim"], dtype, scale=case["scale"])
    options = dict(OPTIONS[case["options"]])
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2, 3, hq, device=device).to(dtype)
    cu_seqlens = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    selection = select(
        q, k, BUDGETS[case["budget"]], cu_seqlens, block=block, tile=tile, backend="torch"
    )
    if case["budget"] == "diagonal":
        selection = _diagonal(selection)

    out, lse, *grads = _run(_triton, q, k, v, selection, options)
    exact = _run(_reference, *(x.double() for x in (q, k, v)), selection, options)
    plain = _run(_plain, q, k, v, selection, options)
    slips = _slips(*(x.double() for x in (q, k, v)), selection, options, out.double(), exact[0])
    names = ["out", "dq", "dk", "dv", "dsinks"]
    for name, ours, right, yardstick in zip(
        names, (out, *grads), (exact[0], *exact[2:]), (plain[0], *plain[2:]), strict=False
    ):
        assert ours.dtype == dtype, name
        error, allowed = _error(ours, right), _error(yardstick, right)
        if name != "out":
            # Weights recomputed from the lse, as in all flash kernels: exp(logit - lse) is as wrong
            # as a rounding of the lse.
            rounding = torch.finfo(torch.float32).eps * exact[1].nan_to_num(neginf=0).abs()
            allowed = max(allowed, rounding.max().item() if rounding.numel() else 0.0)
        if name in slips:
            allowed += _error(right + slips[name], right)
        # A number a head: plain attention may be right by chance, but for its rounding.
        rounding = torch.finfo(dtype).eps / 2 if name == "dsinks" else 0.0
        times = 2 if name == "out" else 3
        assert error <= times * allowed + rounding + 1e-6, (name, error, allowed)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact[1], rtol=2e-6, atol=5e-4)


def _slips(q, k, v, selection, options, out, exact):
    """What a rounded output does to dq and dk: flash kernels take delta = sum(dout * out) from it.

    Where one weight is nearly 1 the true gradients vanish, and this is all that is left of them.
    """
    generator = torch.Generator().manual_seed(9)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    slip = (cotangent * (out - exact)).sum(-1).abs()
    slip += torch.finfo(torch.float32).eps * (cotangent * exact).abs().sum(-1)
    slip, scale = slip[..., None], q.shape[-1] ** -0.5
    v = v.detach().requires_grad_()
    means = sparse_attention(q, k, k, selection, backend="reference", **options)[0]
    attended = sparse_attention(q, k, v, selection, backend="reference", **options)[0]
    return {
        "dq": scale * slip * means,
        "dk": scale * torch.autograd.grad(attended, v, slip * q)[0],
    }


def _error(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def _run(attend, q, k, v, selection, options):
    """Output, lse and the gradients of q, k, v and the sinks under one fixed cotangent."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().clone().to(q.dtype).requires_grad_()
        inputs.append(options["sinks"])
    out, lse = attend(*inputs[:3], selection, options)
    generator = torch.Generator().manual_seed(9)
    cotangent = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, inputs, cotangent, allow_unused=True)
    return [out.detach(), lse, *(torch.zeros_like(x) if g is None else g
                                 for x, g in zip(inputs, grads, strict=True))]  # fmt: skip


def _triton(q, k, v, selection, options):
    return sparse_attention(q, k, v, selection, backend="triton", **options)


def _reference(q, k, v, selection, options):
    return sparse_attention(q, k, v, selection, backend="reference", **options)


def _plain(q, k, v, selection, options):
    """Attention as a user would write it, all in the dtype of its inputs."""
    groups = q.shape[1] // k.shape[1]
    mask = selection.to_mask(options.get("window")).repeat_interleave(groups, 0)
    k, v = (x.transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
    logits = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if "softcap" in options:
        logits = options["softcap"] * (logits / options["softcap"]).tanh()
    logits = logits.masked_fill(~mask, float("-inf"))
    if "sinks" in options:
        sink = options["sinks"][:, None, None].expand(-1, len(q), 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights @ v).transpose(0, 1), None


def _diagonal(selection):
    """The selection with every block but those that reach into the tile emptied."""
    plan = selection.plan
    counts = plan.counts.copy()
    counts[:, 3] += counts[:, :3].sum(1)
    counts[:, :3] = 0
    start = torch.from_numpy(plan.start).to(selection.columns.device)[selection.slot_tile]
    keep = (selection.columns + 1) * plan.block > start
    return Selection(
        replace(plan, counts=counts),
        torch.where(keep, selection.columns, -1),
        torch.where(keep, selection.entry, selection.tile),
    )


def test_sdpa_with_the_mask_agrees(draw, half, masked_sdpa):
    """PyTorch's own attention knows nothing of our definition but `to_mask`."""
    q, k, v = draw(160, 6, 2, 64, half)
    selection = select(q, k, SPARSE, [0, 35, 35, 160], block=16, tile=16)
    assert selection.density < 0.95
    mask = selection.to_mask()
    ours = _run(_triton, q, k, v, selection, {})
    theirs = _run(lambda q, k, v, *_: (masked_sdpa(q, k, v, mask), None), q, k, v, selection, {})
    for mine, other in zip((ours[0], *ours[2:]), (theirs[0], *theirs[2:]), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("queries", [[1], [1, 0, 1], [19, 33]])
def test_cached_keys(queries, draw, half):
    keys = [n + 90 for n in queries]
    q, k, v = draw(sum(queries), 4, 2, 64, half, keys=sum(keys))
    cu, cu_k = ([sum(n[:i]) for i in range(len(n) + 1)] for n in (queries, keys))
    for budget in (SPARSE, Budget.dense()):
        selection = select(q, k, budget, cu, cu_k, block=16, tile=None)
        ours = _run(_triton, q, k, v, selection, {})
        exact = _run(_reference, *(x.double() for x in (q, k, v)), selection, {})
        for mine, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-2, atol=1e-2)


def test_inputs_and_cotangents_of_any_layout(draw, half):
    q, k, v = draw(60, 2, 1, 64, half)
    selection = select(q, k, SPARSE, [0, 37, 60], block=16, tile=16)
    results = []
    for layout in (
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x),
    ):  # fmt: skip
        inputs = [layout(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = sparse_attention(*inputs, selection, backend="triton")
        cotangent = layout(torch.ones_like(q) / 3)
        results.append((out, lse, *torch.autograd.grad(out, inputs, cotangent)))
    for other in results[1:]:
        for mine, plain in zip(other, results[0], strict=True):
            assert torch.equal(mine, plain)


def test_repeats_bit_for_bit(draw, half, monkeypatch):
    """Long columns are cut, their parts added in a fixed order."""
    monkeypatch.setattr(backend, "make_work", lambda selection: make_work(selection, 2))
    q, k, v = draw(110, 4, 2, 16, half)
    selection = select(q, k, SPARSE, block=16, tile=16)
    first, second = (_run(_triton, q, k, v, selection, {}) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_every_element_is_written(draw, half, monkeypatch):
    """Results do not depend on what memory held before: it is poisoned here."""
    q, k, v = draw(77, 3, 1, 96, half)
    sinks = torch.zeros(3, dtype=half, device=q.device)
    # Queries are the last ones: the first keys are seen by no tile, and get gradients of 0.
    cached = draw(10, 3, 1, 96, half, keys=200)
    cases = [
        (q, k, v, select(q, k, SPARSE, [0, 30, 77], block=16, tile=16)),
        (*cached, select(*cached[:2], SPARSE, [0, 10], [0, 200], block=16, tile=16)),
    ]
    expected = [_run(_triton, *case, {"sinks": sinks}) for case in cases]
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    for case, right in zip(cases, expected, strict=True):
        for mine, other in zip(_run(_triton, *case, {"sinks": sinks}), right, strict=True):
            assert torch.equal(mine, other)


def test_nan_in_one_document_stays_there(draw, half):
    q, k, v = draw(120, 4, 2, 64, half)
    selection = select(q, k, SPARSE, [0, 45, 120], block=16, tile=16)
    clean = sparse_attention(q, k, v, selection, backend="triton")[0]
    for x in (q, k, v):
        x[45:] = float("nan")
    out = sparse_attention(q, k, v, selection, backend="triton")[0]
    assert torch.equal(out[:45], clean[:45])
    assert out[45:].isnan().all()


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_every_row_of_the_launch_table_is_there(kernel):
    for target in ("sm_80", "sm_90"):
        assert set(config.TABLE[target][kernel]) == {64, 128, 256}
