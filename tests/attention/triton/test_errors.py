"""What the Triton backend cannot compute is named before anything is."""

import subprocess
import sys

import pytest
import torch

from lit_sparse.attention import select, sparse_attention
from lit_sparse.attention.triton import backend
from lit_sparse.budget import Budget

Q, K, V = torch.randn(40, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)


def _attend(q=Q, k=K, v=V, *, block=16, **options):
    selection = select(q, k, Budget(), block=block, backend="torch")
    return sparse_attention(q, k, v, selection, backend="triton", **options)


WRONG = {
    "float64": ({"q": Q.double(), "k": K.double(), "v": V.double()}, "got torch.float64"),
    "head_dim not a multiple": (
        {"q": Q[..., :8], "k": K[..., :8], "v": V[..., :8]},
        "head_dim that is a multiple of 16 from 16 to 256, got 8",
    ),
    "head_dim too large": (
        {"q": Q.repeat(1, 1, 17), "k": K.repeat(1, 1, 17), "v": V.repeat(1, 1, 17)},
        "got 272",
    ),
    "block": ({"block": 8}, "blocks of 16 keys or more, got block=8"),
    "groups": (
        {"q": Q.repeat(1, 9, 1), "k": K, "v": V},
        "up to 16 query heads per key-value head, got 18",
    ),
    "scale": ({"scale": -1.0}, "scale must not be negative"),
    "window": ({"window": 0}, "window must be None or a positive number"),
    "softcap": ({"softcap": -2.0}, "softcap must be None or positive"),
    "sinks": ({"sinks": torch.zeros(2)}, "sinks must be .4. on cpu"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_the_argument_is_named(wrong, message):
    if not backend.interpreting():
        pytest.skip("CPU tensors need the interpreter")
    with pytest.raises(ValueError, match=message):
        _attend(**wrong)


def test_a_selection_made_for_other_shapes():
    selection = select(Q, K, Budget(), block=16)
    with pytest.raises(ValueError, match="with the selection's 40 tokens"):
        sparse_attention(Q[:39], K[:39], V[:39], selection, backend="triton")
    with pytest.raises(ValueError, match="selection is for 2 key-value heads"):
        sparse_attention(Q, Q, Q, selection, backend="triton")


def test_cpu_tensors_without_the_interpreter_are_refused():
    code = (
        "import torch; from lit_sparse import Budget, select, sparse_attention\n"
        "q = torch.randn(40, 4, 16); s = select(q, q, Budget(), block=16)\n"
        "try: sparse_attention(q, q, q, s, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
        env={"PATH": "", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert "takes CUDA tensors, got CPU ones: pass backend='cpu'" in done.stdout


def test_no_tokens_at_all():
    if not backend.interpreting():
        pytest.skip("CPU tensors need the interpreter")
    q, k, v = (x[:0].clone().requires_grad_() for x in (Q, K, V))
    selection = select(q, k, Budget(), [0, 0, 0], block=16, backend="triton")
    out, lse = sparse_attention(q, k, v, selection, backend="triton")
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.numel() == 0
