"""Sparsified models on the Triton backend, eager and compiled, and the operator's own checks."""

import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.models import Law, sparsify
from lit_sparse.models.ops import attention
from lit_sparse.models.state import LayerState, ModelState

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*below what is always kept"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TIGHT = Budget(alpha=5.0, exponent=0.5, floor=0, sink=16, local=0.1, late=0.3)


@pytest.fixture
def dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def test_a_model_is_the_same_on_every_backend_and_compiled(device, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype)
    tokens = torch.randint(64, (1, 120), device=device)
    positions = torch.cat([torch.arange(25), torch.arange(95)]).to(device)[None]

    def step(run):
        loss = run(input_ids=tokens, position_ids=positions, labels=tokens).loss
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    sparsify(model, TIGHT, block=16, tile=16, backend="reference")
    expected = step(model)
    sparsify(model, TIGHT, block=16, tile=16, backend="triton")
    eager = step(model)
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for right, mine, whole in zip(expected, eager, compiled, strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(whole, mine, rtol=tolerance, atol=tolerance)


def test_is_a_proper_operator(device, dtype):
    model = ModelState(Law(TIGHT, block=16, tile=16))
    layer = LayerState(0, "self_attn", model)
    q, k, v = (
        torch.randn(1, 110, heads, 16, device=device, dtype=dtype, requires_grad=True)
        for heads in (2, 1, 1)
    )
    sinks = torch.zeros(2, device=device, dtype=dtype, requires_grad=True)
    rest = (layer.number, model.number, layer.law, 0.25, 60, 5.0, "triton")
    torch.library.opcheck(attention, (q, k, v, sinks, None, None, None, None, *rest))
    out, lse, columns, _ = attention(q, k, v, sinks, None, None, None, None, *rest)
    assert columns.shape[1] > 0
    assert out.requires_grad
    assert not lse.requires_grad
