"""The same tests run in Triton's interpreter on a CPU (tests/conftest.py turns it on), and on a GPU
where there is one: there they are of those that `pytest -m gpu` runs.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="module")
def _patch_once():
    """The interpreter patches Triton's language at every launch, and again at every call of a
    device function within it, which takes a third of its time here.
    """
    if DEVICE == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
    scope.restore()


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def half():
    """The low precision of the device: the interpreter computes bfloat16 products wrongly."""
    return torch.bfloat16 if DEVICE == "cuda" else torch.float16


@pytest.fixture
def draw(device):
    """Builds q [T, Hq, D], k and v [Tk, Hkv, D] on the device; the scale multiplies all three."""

    def build(tokens, hq, hkv, dim, dtype, *, keys=None, scale=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        keys = tokens if keys is None else keys
        shapes = ((tokens, hq, dim), (keys, hkv, dim), (keys, hkv, dim))
        return tuple(
            (scale * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes
        )

    return build
