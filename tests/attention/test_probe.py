"""The probe against brute force: one row at a time, in float64, with a dense mask."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity

from lit_sparse import Budget
from lit_sparse.attention import probe, select, sparse_attention
from lit_sparse.attention.options import Options
from lit_sparse.attention.probe import probe_rows, sample_rows
from lit_sparse.attention.row_statistics import SINK_TOKENS, STATISTICS

BUDGET = Budget(alpha=1, exponent=0.5, floor=112, sink=8, local=0.25, late=0.4)
DERIVED = ("tau", "captured_mass", "entropy_ratio", "entropy_ratio_without_sink", "gamma")
DERIVED += ("effective_support", "participation", "jacobian_trace", "gamma_of_entropy")

pytestmark = pytest.mark.filterwarnings("ignore:.*effective minimum.*")


def by_hand(q, k, v, selection, row, head, scale, softcap=None, sinks=None):
    """All statistics of one row, from their definitions."""
    q, k, v = q.double(), k.double(), v.double()
    document = max(d for d, start in enumerate(selection.plan.queries[:-1]) if start <= row)
    begin = selection.plan.queries[document]
    kv = head // (q.shape[1] // k.shape[1])
    s = scale * k[begin : row + 1, kv] @ q[row, head]
    s = s if softcap is None else softcap * (s / softcap).tanh()
    p, values = s.softmax(0), v[begin : row + 1, kv]
    mask = selection.to_mask()[kv, row, begin : row + 1]
    n, rest = len(s), p[SINK_TOKENS:] / p[SINK_TOKENS:].sum()
    # A learned sink joins each softmax, and has no value.
    sink = torch.tensor([-math.inf if sinks is None else float(sinks[head])], dtype=s.dtype)
    all_keys, kept_keys = (torch.cat([x, sink]).softmax(0)[:-1] for x in (s, s[mask]))
    kl = torch.cat([s, sink]).logsumexp(0) - torch.cat([s[mask], sink]).logsumexp(0)
    dense, sparse = all_keys @ values, kept_keys @ values[mask]

    def entropy(p):
        return -(p * p.clamp(min=1e-300).log()).sum() if len(p) else torch.zeros(())

    tile = int(selection.row_places(torch.tensor([row]))[0])
    block = selection.block
    far = range(int(selection.plan.counts[tile, 0]), int(selection.plan.first_local[tile]))
    mass = {b: p[b * block : (b + 1) * block].sum() for b in far}
    chosen = [float(mass[b]) for b in far if mask[b * block]]
    best = sum(sorted(map(float, mass.values()), reverse=True)[: len(chosen)])
    found = {
        "kl": kl,
        "tau": all_keys[~mask].sum(),
        "captured_mass": 1 - all_keys[~mask].sum(),
        "output_error": (dense - sparse).norm() / dense.norm(),
        "recall": sum(chosen) / best if chosen else math.nan,
        "entropy": entropy(p),
        "entropy_without_sink": entropy(rest),
        "entropy_ratio": entropy(p) / math.log(n) if n > 1 else 1.0,
        "entropy_ratio_without_sink": (
            entropy(rest) / math.log(len(rest)) if len(rest) > 1 else 1.0
        ),
        "effective_support": entropy(p).exp(),
        "max_weight": p.max(),
        "max_weight_without_sink": rest.max() if len(rest) else 0.0,
        "collision": p.square().sum(),
        "collision_without_sink": rest.square().sum(),
        "participation": 1 / p.square().sum(),
        "jacobian_trace": (p * (1 - p)).sum(),
        "sink_mass": 1 - all_keys[SINK_TOKENS:].sum(),
        "logit_std": s.std(correction=0),
        "logit_max": s.abs().max(),
        "logit_range": s.max() - s.min(),
        "gamma": s.var(correction=0) / (2 * math.log(max(n, 2))),
        "gamma_of_entropy": 1 - entropy(p) / math.log(n) if n > 1 else 0.0,
    }
    return {name: float(value) for name, value in found.items()}


def check(found, rows, heads, want, names=(*STATISTICS, *DERIVED), **tolerance):
    wanted = [[want(row, head) for head in heads] for row in rows.tolist()]
    for name in names:
        expected = [[statistics[name] for statistics in line] for line in wanted]
        value = getattr(found, name).double()
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(
            value, expected, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_every_statistic_is_its_definition(packed, boundaries, scale):
    # Empty documents at both ends and in the middle, one of a single token, odd lengths.
    cu = boundaries([0, 1, 70, 0, 229, 0])
    q, k, v = packed(300, scale=scale**0.5)
    selection = select(q, k, BUDGET, cu, block=16, tile=16)
    rows = torch.tensor([0, 1, 2, 5, 70, 71, 200, 235, 285, 290, 299])
    found = probe_rows(q, k, v, selection, rows)
    check(
        found,
        rows,
        range(4),
        lambda row, head: by_hand(q, k, v, selection, row, head, 0.25),
        atol=1e-9,
        rtol=1e-7,
    )
    assert found.context.tolist() == [1, 1, 2, 5, 70, 1, 130, 165, 215, 220, 229]
    assert found.tau.max() > 1e-3
    assert (found.recall < 1).any()
    # Blocks that enter late are seen by the later rows of a tile only.
    seen = selection.rows_blocks(torch.arange(263, 279)).sum(-1)
    assert (seen[:, 0] < seen[:, -1]).any()


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_soft_caps_and_sinks(packed, scale):
    q, k, v = packed(240, scale=scale**0.5)
    selection = select(q, k, BUDGET, scale=0.3, block=16, tile=16)
    rows, sinks = torch.tensor([0, 5, 150, 201, 239]), torch.tensor([-3.0, 0.0, 2.0, 9.0])
    for softcap, learned in ((4.0, None), (None, sinks), (4.0, sinks)):
        options = Options(0.3, softcap=softcap, sinks=learned)
        extras = {"softcap": softcap, "sinks": learned}

        def want(row, head, extras=extras):
            return by_hand(q, k, v, selection, row, head, 0.3, **extras)

        check(
            probe_rows(q, k, v, selection, rows, options), rows, range(4), want,
            atol=1e-9, rtol=1e-7,
        )  # fmt: skip
        # And of the operator that ran, some heads of it.
        out, lse = sparse_attention(q, k, v, selection, 0.3, **extras)
        heads = [1, 3]
        found = probe_rows(q, k, v, selection, rows, options, out=out, lse=lse, heads=heads)
        check(found, rows, heads, want, atol=1e-9, rtol=1e-7)
    assert found.tau.max() > 1e-4
    with pytest.raises(ValueError, match="window of 8 keys is not measured.*law_layers"):
        probe_rows(q, k, v, selection, rows, Options(0.3, window=8))


@pytest.mark.parametrize(("hq", "hkv"), [(2, 2), (3, 1), (4, 1), (14, 2), (8, 1)])
def test_dropped_mass_of_the_operator_that_ran(packed, boundaries, hq, hkv):
    cu = boundaries([90, 0, 231])
    q, k, v = packed(321, hq, hkv, scale=2.0, dtype=torch.float32)
    selection = select(q, k, BUDGET, cu, block=16, tile=16)
    out, lse = sparse_attention(q, k, v, selection)
    rows = torch.tensor([89, 90, 250, 303, 320])
    heads = [0, hq - 1]
    found = probe_rows(q, k, v, selection, rows, out=out, lse=lse, heads=heads)
    names = ("tau", "captured_mass", "kl", "output_error", "entropy", "recall")
    check(
        found,
        rows,
        heads,
        lambda row, head: by_hand(q, k, v, selection, row, head, 0.25),
        names,
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(found.kl, -torch.log1p(-found.tau), atol=1e-6, rtol=1e-5)


def test_large_logits_in_float32_keep_their_digits(packed):
    """Log-sum-exps near 1000 subtracted from each other would lose all but four."""
    q, k, v = (x.float() for x in packed(280, scale=16.0))
    k[200:, :] = k[200:201]  # logits that lie near each other
    selection = select(q, k, BUDGET, block=16, tile=16)
    rows = torch.arange(210, 280, 7)
    found, exact = (
        probe_rows(*(x.to(kind) for x in (q, k, v)), selection, rows)
        for kind in (torch.float32, torch.float64)
    )
    assert exact.logit_max.max() > 500
    assert (exact.tau > 0.1).any()
    torch.testing.assert_close(found.tau.double(), exact.tau, atol=1e-5, rtol=0)


def test_chunks_change_nothing(packed, boundaries, monkeypatch):
    cu = boundaries([100, 260])
    q, k, v = packed(360, 8, 4)
    selection = select(q, k, BUDGET, cu, block=16, tile=16)
    rows = torch.tensor([359, 3, 99, 100, 280, 101, 350])  # in no order either
    whole = probe_rows(q, k, v, selection, rows)
    monkeypatch.setattr(probe, "_CHUNK_BYTES", (4 * 260 * 16, 0))
    parts = probe_rows(q, k, v, selection, rows)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), equal_nan=True)


def test_nothing_dropped_is_no_gap(packed):
    q, k, v = packed(90)
    selection = select(q, k, Budget.dense(), block=16, tile=16)
    found = probe_rows(q, k, v, selection, torch.arange(90))
    assert found.kl.max() < 1e-12
    assert found.output_error.max() < 1e-12
    assert found.recall.isnan().all()


def test_sampled_rows_see_enough_and_do_not_repeat(packed, boundaries):
    q, k, _ = packed(300)
    plan = select(q, k, BUDGET, boundaries([90, 0, 210]), block=16, tile=16).plan
    rows = sample_rows(plan, 50, torch.Generator().manual_seed(0), min_context=64)
    assert len(rows.unique()) == 50
    positions = torch.where(rows < 90, rows, rows - 90)
    assert (positions + 1 >= 64).all()
    assert sample_rows(plan, 1000, min_context=1).tolist() == list(range(300))
    assert len(sample_rows(plan, 5, min_context=1000)) == 0


def test_the_probe_keeps_nothing_quadratic(packed):
    """Its largest tensor is a chunk of rows x context."""
    q, k, v = packed(2048, 2, 1, dtype=torch.float32)
    selection = select(q, k, BUDGET, block=16, tile=16)
    out, lse = sparse_attention(q, k, v, selection)
    rows = torch.arange(0, 2048, 4)
    with torch.profiler.profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profile:
        probe_rows(q, k, v, selection, rows, out=out, lse=lse)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 3 * 2**20 < 512 * 2 * 2048 * 4


def test_half_precision_is_measured_in_float32(packed):
    q, k, v = (x.bfloat16() for x in packed(250, 4, 2, scale=2.0))
    selection = select(q, k, BUDGET, block=16, tile=16)
    out, lse = sparse_attention(q, k, v, selection)
    rows = torch.arange(200, 250, 7)
    found = probe_rows(q, k, v, selection, rows, out=out, lse=lse)
    exact = probe_rows(q.double(), k.double(), v.double(), selection, rows)
    assert found.tau.dtype == torch.float32
    for name in ("tau", "entropy", "logit_max", "recall"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(exact, name), atol=1e-4, rtol=1e-4
        )
    # The output's rounding to bfloat16 is the operator's, and counts.
    assert (found.output_error.double() - exact.output_error).abs().max() < 4e-3
