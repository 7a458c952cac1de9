"""`lit_sparse::attention`: PyTorch's own checks of an operator, gradients, lifetime."""

import pickle

import pytest
import torch

from lit_sparse.budget import Budget
from lit_sparse.models import Law, state
from lit_sparse.models.ops import attention
from lit_sparse.models.state import LayerState, ModelState, read_law


@pytest.fixture
def model():
    return ModelState(Law(Budget.fixed(48, sink=16, local=0.25), block=16, tile=16))


@pytest.fixture
def arguments(model):
    """Builds the operator's arguments for `rows` of `length` tokens, 2 key-value heads."""

    def build(
        rows=1, length=150, heads=4, cached=0, positions=None, mask=None, lengths=None, **others
    ):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, requires_grad=True)

        q = draw(rows, length, heads, 16)
        k, v = (draw(rows, length + cached, 2, 16) for _ in range(2))
        layer = LayerState(0, "self_attn", model)
        sinks = draw(heads) if others.pop("sinks", False) else None
        asking = (layer.number, model.number, layer.law)
        tensors = (q, k, v, sinks, mask, positions, lengths, lengths, *asking)
        constants = {"scale": 0.25, "window": None, "softcap": None}
        return (*tensors, *{**constants, "backend": None, **others}.values())

    return build


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def padded():
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, :30] = False
    return mask


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"heads": 2},
        {"positions": positions(110, 40)},
        {"lengths": torch.tensor([0, 0, 120, 150])},
        {"rows": 2, "length": 100, "mask": padded()},
        {"rows": 2, "length": 1, "cached": 99, "mask": padded()},
        {"length": 30},
        {"length": 20, "mask": torch.zeros(1, 20, dtype=torch.bool)},
        {"backend": "reference", "sinks": True, "window": 40, "softcap": 5.0},
    ],
    ids=[
        "plain",
        "mha",
        "packed",
        "empty document",
        "padded",
        "decoding",
        "dense",
        "only padding",
        "options",
    ],
)
def test_is_a_proper_operator(arguments, case):
    args = arguments(**case)
    torch.library.opcheck(attention, args)
    out, lse, *_ = attention(*args)
    assert out.shape == args[0].shape
    assert not lse.requires_grad


def test_backward_is_a_proper_operator(arguments):
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments()]
    results = attention(*args)
    torch.library.opcheck(
        torch.ops.lit_sparse.attention_backward.default, (results[0] + 1, *results, *args)
    )


def test_gradients(arguments):
    """Against finite differences: of sinks, past a cap, and 0 at padding."""
    options = {"window": 40, "softcap": 5.0, "sinks": True, "backend": "reference"}
    args = arguments(rows=2, length=100, mask=padded(), **options)
    double = [x.detach().double() for x in args[:4]]
    inputs = [x.requires_grad_() for x in double]
    out, *_ = attention(*inputs, *args[4:])
    cotangent = torch.randn(out.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    assert not gradients[0][1, :30].any(), "padding"
    for x, gradient in zip(inputs, gradients, strict=True):
        direction = torch.randn_like(x)
        step = 1e-6

        def at(sign, x=x, direction=direction, step=step):
            moved = [y + sign * step * direction if y is x else y for y in inputs]
            with torch.no_grad():
                return (attention(*moved, *args[4:])[0] * cotangent).sum()

        slope = (at(1) - at(-1)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


def test_backward_outlives_the_model(arguments, model):
    args = arguments(positions=positions(110, 40))
    attention(*args)[0].sum().backward()
    expected = args[0].grad.clone()
    args[0].grad = None
    out = attention(*args)[0].sum()
    del ModelState.numbered[int(model.number)]
    out.backward()
    assert torch.equal(args[0].grad, expected)


def test_a_law_goes_along_to_another_process(model, monkeypatch):
    stored = pickle.dumps(LayerState(0, "self_attn", model))
    monkeypatch.setattr(state, "_laws", [])
    assert read_law(pickle.loads(stored).law) == model.law
