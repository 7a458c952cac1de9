"""What only a GPU can show: real bfloat16 products, large sizes, independent implementations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_sparse.attention import reference, select, sparse_attention
from lit_sparse.budget import Budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*below what is always kept"),
]

LAW = Budget(alpha=16.0, exponent=0.5, floor=0)


def _inputs(tokens, hq=8, hkv=2, dim=128, scale=1.0, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        (scale * torch.randn(tokens, heads, dim, device="cuda", generator=generator)).to(dtype)
        for heads in (hq, hkv, hkv, hq)
    ]


def _grads(attend, q, k, v, cotangent):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def _error(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def _by_rows(q, k, v, cotangent, selection, dtype, step=1024):
    """SDPA under the selection's mask, some rows at a time: outputs and gradients in `dtype`."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    outs = []
    for begin in range(0, len(q), step):
        rows = torch.arange(begin, min(begin + step, len(q)), device=q.device)
        mask = selection.rows_mask(rows, len(k)).repeat_interleave(groups, 0)
        out = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None],
            k.transpose(0, 1)[None].repeat_interleave(groups, 1),
            v.transpose(0, 1)[None].repeat_interleave(groups, 1),
            attn_mask=mask[None],
        )[0].transpose(0, 1)
        out.backward(cotangent[rows].to(dtype))
        outs.append(out.detach())
    return [torch.cat(outs), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize(("hq", "hkv", "dim"), [(8, 2, 128), (6, 2, 64), (7, 1, 96), (4, 2, 256)])
def test_sdpa_with_the_mask_at_4k(hq, hkv, dim, scale):
    """Hot columns are cut here, and lists have late blocks; the yardstick is SDPA in bfloat16."""
    q, k, v, cotangent = _inputs(4096, hq, hkv, dim, scale)
    selection = select(q, k, LAW)
    assert (selection.entry > 0).any()
    exact = _by_rows(q, k, v, cotangent, selection, torch.float32)
    plain = _by_rows(q, k, v, cotangent, selection, torch.bfloat16)
    ours = _grads(lambda *x: sparse_attention(*x, selection, backend="triton")[0],
                  q, k, v, cotangent)  # fmt: skip
    for name, allowed, mine, right, usual in zip(
        ("out", "dq", "dk", "dv"), (2, 3, 3, 3), ours, exact, plain, strict=True
    ):
        assert _error(mine, right) <= allowed * _error(usual, right), name


def test_sdpa_with_the_mask_at_64k():
    q, k, v, cotangent = _inputs(65536, 4, 1, 128)
    selection = select(q, k, LAW)
    exact = _by_rows(q, k, v, cotangent, selection, torch.float32)
    ours = _grads(lambda *x: sparse_attention(*x, selection)[0], q, k, v, cotangent)
    for name, mine, right in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert _error(mine, right) < 0.01, name


def test_flex_attention_on_the_same_blocks():
    """An independent kernel that is told the blocks and the mask, forward and backward."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, cotangent = _inputs(4096, 8, 2, 64)
    selection = select(q, k, LAW, tile=64, block=64)
    mask = selection.to_block_mask(4)
    kernel = torch.compile(flex_attention)

    def flex(q, k, v):
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = kernel(*heads_first, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    ours = _grads(lambda *x: sparse_attention(*x, selection)[0], q, k, v, cotangent)
    theirs = _grads(flex, q, k, v, cotangent)
    for name, mine, other in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert _error(mine, other) < 0.015, name


def test_offsets_past_two_to_the_31():
    """The last document of a row of 2.7e9 elements is what it is alone, gradients too."""
    length, documents = 4096, 160
    q, k, v, cotangent = _inputs(length * documents, 32, 8, 128)
    assert q.numel() > 2**31
    bounds = list(range(0, length * documents + 1, length))
    selection = select(q, k, LAW, bounds)
    packed = _grads(lambda *x: sparse_attention(*x, selection)[0], q, k, v, cotangent)
    last = [x[-length:].clone() for x in (q, k, v, cotangent)]
    own = select(*last[:2], LAW)
    assert torch.equal(own.columns, selection.columns[:, -own.columns.shape[1] :])
    alone = _grads(lambda *x: sparse_attention(*x, own)[0], *last)
    for mine, other in zip(packed, alone, strict=True):
        assert _error(mine[-length:], other) < 1e-2
        assert mine[-length:].abs().sum() > 0


def test_causal_at_every_row_of_a_tile():
    q, k, v, _ = _inputs(4096, 4, 1, 64)
    other = _inputs(4096, 4, 1, 64, scale=3.0, seed=1)
    selection = select(q, k, LAW)
    before = sparse_attention(q, k, v, selection)
    for row in range(selection.tile):
        p = 2048 + row
        x, y, z = (torch.cat([a[: p + 1], b[p + 1 :]]) for a, b in zip((q, k, v), other[:3],
                                                                      strict=True))  # fmt: skip
        after = sparse_attention(x, y, z, select(x, y, LAW))
        for one, two in zip(before, after, strict=True):
            assert torch.equal(one[: p + 1], two[: p + 1]), row


def test_repeats_bit_for_bit():
    q, k, v, cotangent = _inputs(32768)
    runs = []
    for _ in range(3):
        selection = select(q, k, LAW)
        grads = _grads(lambda *x, s=selection: sparse_attention(*x, s)[0], q, k, v, cotangent)
        runs.append((selection.columns, selection.entry, *grads))
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_device():
    """Neither selection nor forward nor backward, once a plan has been on the device."""
    q, k, v, cotangent = _inputs(8192)

    def step():
        selection = select(q, k, LAW, [0, 5000, 8192])
        return _grads(lambda *x: sparse_attention(*x, selection)[0], q, k, v, cotangent)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_selection_keeps_what_the_definition_keeps():
    """bfloat16 means and products rank a little otherwise: the mass they keep is the same."""
    q, k, v, _ = _inputs(16384, 8, 2, 128, scale=1.5)
    ours = select(q, k, LAW)
    exact = select(q.float(), k.float(), LAW, backend="torch")
    assert ours.density == pytest.approx(exact.density, rel=0.01)
    lse = [sparse_attention(q, k, v, s, backend="triton")[1].double() for s in (ours, exact)]
    assert abs((lse[0] - lse[1]).mean()) < 2e-3
    agree = (ours.entry_table() == exact.entry_table()).float().mean()
    assert agree > 0.98


@pytest.mark.parametrize("bounds", [[0, 2000], [0, 500, 1000, 1500], [0, 100, 100, 700, 1900]])
@pytest.mark.parametrize("dim", [64, 128])
def test_dense_fallback(bounds, dim):
    q, k, v, cotangent = _inputs(bounds[-1], 8, 2, dim)
    selection = select(q, k, Budget.dense(), bounds)
    assert selection.keeps_everything
    out, lse = sparse_attention(q, k, v, selection)
    right, right_lse = reference.attention(q.double(), k.double(), v.double(), selection)
    assert _error(out, right) < 0.01
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-4, atol=1e-3)
    ours = _grads(lambda *x: sparse_attention(*x, selection)[0], q, k, v, cotangent)
    kernels = _grads(lambda *x: sparse_attention(*x, selection, backend="triton")[0],
                     q, k, v, cotangent)  # fmt: skip
    for mine, other in zip(ours, kernels, strict=True):
        assert _error(mine, other) < 0.01


def test_a_sparsified_model_trains_and_compiles():
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_sparse import sparsify

    config = LlamaConfig(
        vocab_size=257, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = sparsify(LlamaForCausalLM(config).to("cuda", torch.bfloat16), LAW)
    tokens = torch.randint(257, (1, 4096), device="cuda")
    positions = torch.cat([torch.arange(1000), torch.arange(3096)]).to("cuda")[None]
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        loss = run(input_ids=tokens, position_ids=positions, labels=tokens).loss
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-2)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert _error(one, other) < 0.1


def test_what_a_gpu_does_not_take_is_named():
    q, k, v, _ = _inputs(200, dtype=torch.float32)
    selection = select(q, k, LAW, block=16, backend="torch")
    with pytest.raises(ValueError, match="bfloat16 or float16 on CUDA, got torch.float32"):
        sparse_attention(q, k, v, selection)
    with pytest.raises(ValueError, match="the selection is on cuda"):
        sparse_attention(q.cpu(), k.cpu(), v.cpu(), selection)


SMALL = """
import torch
from lit_sparse import Budget, select, sparse_attention
q, k, v = (torch.randn(700, h, 64, device="cuda").bfloat16().requires_grad_() for h in (6, 2, 2))
s = select(q, k, Budget(4, 0.5, floor=0, sink=16), [0, 300, 300, 301, 700], block=16)
assert not s.keeps_everything
sparse_attention(q, k, v, s)[0].sum().backward()
torch.cuda.synchronize()
"""


def test_no_access_out_of_bounds():
    places = ("/usr/local/cuda/bin", "/opt/cuda/bin", os.environ.get("CUDA_HOME", "") + "/bin")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "3", sys.executable, "-c", SMALL],
        capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
