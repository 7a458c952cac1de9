"""What rows need, against sorting each row by brute force."""

import math

import pytest
import torch

from lit_sparse.attention.need import NEEDS, rows_need
from lit_sparse.attention.options import Options

LENGTHS = [201, 0, 37, 1, 130]
BLOCK, SINK, LOCAL = 16, 20, 24


def _brute_force(q, k, row, begin, *, missed, block=BLOCK, sink=SINK, local=LOCAL, scale, softcap):
    """The needs of one row and head, in Python's own arithmetic. q [T, D], k [T, D] of the head."""
    n = row - begin + 1
    logits = scale * (k[begin : row + 1] @ q[row])
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()).tolist()
    rest = [s for j, s in enumerate(logits) if sink <= j < n - local]
    blocks = [
        logits[b : b + block]
        for b in range(0, n, block)
        if b >= sink and b + block <= max(n - local, 0)
    ]

    def spare(candidates):
        weights = sorted(math.fsum(math.exp(s - max(logits)) for s in c) for c in candidates)
        total = math.fsum(weights)
        count = 0
        while count < len(weights) and math.fsum(weights[: count + 1]) <= missed * total:
            count += 1
        return count

    found = {"keys": n - spare([[s] for s in rest]), "block_keys": n - block * spare(blocks)}
    if not rest:
        return found | dict.fromkeys(("support", "logit_range", "logit_std"), 0.0)
    p = torch.tensor(rest, dtype=torch.float64)
    weights = p.softmax(0)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum()
    found |= {"support": entropy.exp(), "logit_range": p.max() - p.min()}
    return found | {"logit_std": p.std(correction=0)}


@pytest.mark.parametrize(("size", "softcap"), [(1.0, None), (4.0, None), (16.0, None), (16.0, 5.0)])
def test_needs_are_those_of_brute_force(size, softcap, packed, boundaries):
    q, k, _ = packed(sum(LENGTHS), 4, 2, dim=8, scale=math.sqrt(size))
    cu_seqlens = boundaries(LENGTHS)
    # Rows that see nothing but what is always kept, odd lengths, a document of one token.
    rows = torch.tensor([0, 19, 43, 44, 45, 46, 100, 191, 200, 201, 237, 238, 239, 300, 368])
    options = {"block": BLOCK, "sink": SINK, "local": LOCAL}
    # A learned sink is always kept, and so out of what is measured.
    options["options"] = Options(0.4, softcap=softcap, sinks=torch.full((4,), 9.0))
    need = rows_need(q, k, rows, cu_seqlens, missed=0.1, **options)
    starts = [max(b for b in cu_seqlens[:-1] if b <= row) for row in rows.tolist()]
    # Of two documents that start at the same token, one has none.
    assert need.context.tolist() == [r - b + 1 for r, b in zip(rows.tolist(), starts, strict=True)]
    for i, (row, begin) in enumerate(zip(rows.tolist(), starts, strict=True)):
        for head in range(4):
            own = (q[:, head], k[:, head // 2], row, begin)
            expected = _brute_force(*own, missed=0.1, scale=0.4, softcap=softcap)
            for name in NEEDS:
                value = float(getattr(need, name)[i, head])
                assert value == pytest.approx(float(expected[name]), rel=1e-9), (name, row, head)
    assert bool((need.block_keys >= need.keys).all())
    assert bool((need.block_keys <= need.context[:, None]).all())


def test_half_precision_and_chunks_change_nothing(packed, monkeypatch):
    """Rows one at a time, in float32 from bfloat16, are those of all at once in float64."""
    q, k, _ = (x.bfloat16() for x in packed(300, 4, 2, dim=16, scale=2.0))
    rows = torch.tensor([299, 150, 299])
    options = {"sink": 4, "local": 8, "block": 8}
    exact = rows_need(q.double(), k.double(), rows, **options)
    monkeypatch.setattr("lit_sparse.attention.need._CHUNK_BYTES", 1)
    need = rows_need(q, k, rows, **options)
    for name in NEEDS:
        value = getattr(need, name)
        assert value.dtype == torch.float32
        assert torch.equal(value[0], value[2])
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-5, atol=1e-4)


def test_equal_keys_need_the_share_that_may_not_be_missed():
    """However many of them, and whatever rounding does to their sum."""
    q = torch.zeros(8100, 1, 4)
    rows = torch.tensor([119, 1099, 8099])
    need = rows_need(q, q, rows, missed=0.05, block=50, sink=50, local=50)
    assert need.keys[:, 0].tolist() == [100 + 19, 100 + 950, 100 + 7600]
    assert need.block_keys[:, 0].tolist() == [120, 100 + 950, 100 + 7600]
    torch.testing.assert_close(need.support[:, 0], torch.tensor([20.0, 1000.0, 8000.0]))


def test_a_sink_does_not_hide_what_the_rest_needs():
    """One key has all but e^-100 of the mass; the rest counts as if it were not there."""
    k = torch.zeros(400, 1, 1)
    k[0] = 100.0
    q = torch.ones(400, 1, 1)
    options = {"sink": 0, "local": 0, "block": 1, "options": Options(1.0)}
    with_sink = rows_need(q, k, torch.tensor([399]), **options)
    assert with_sink.keys.item() == with_sink.block_keys.item() == 1
    without = rows_need(q, k, torch.tensor([399]), **{**options, "sink": 1})
    assert without.keys.item() == without.block_keys.item() == 400 - 19
    assert without.logit_range.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missed": 0.0}, "missed must lie strictly between 0 and 1, got 0.0"),
        ({"missed": 1}, "missed"),
        ({"block": 0}, "block must be at least 1"),
        ({"sink": -1}, "sink and local at least 0"),
        ({"options": Options(1.0, window=8)}, "window of 8 keys"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens must run from 0 to the 10 tokens"),
        ({"rows": torch.tensor([10])}, "rows must be int64"),
        ({"k": torch.zeros(9, 2, 4)}, "q has 10 tokens and k 9"),
        ({"k": torch.zeros(10, 3, 4)}, "the 3 heads of k must divide the 4 heads of q"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"q": torch.zeros(10, 4, 4), "k": torch.zeros(10, 2, 4), "rows": torch.tensor([3])}
    with pytest.raises(ValueError, match=message):
        rows_need(**{**arguments, **change})
