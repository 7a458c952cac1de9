"""Liger's kernels: gradients stay. In Triton's interpreter (tests/conftest.py), or on a GPU."""

import copy
import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from lit_sparse import Budget, sparsify, unsparsify
from lit_sparse.models import is_sparse, set_rope
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.training import SparseLM
from lit_sparse.training.activations import set_activations
from lit_sparse.training.liger import use_liger_kernels
from lit_sparse.training.loss import summed_loss
from lit_sparse.training.tiled import tile_mlps

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LOSS = partial(summed_loss, kind="liger")
ADAPTERS = LoRA(rank=2, targets="all-linear", train_norms=True)
KINDS = ("llama", "mistral", "qwen2", "qwen3")
FULL = {"layer_types": ["full_attention"]}
OTHERS = {
    "gemma2": {"head_dim": 8, **FULL},
    "gemma3": {"head_dim": 8, **FULL},
    "phi3": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **FULL},
}
"""Families and what their tiny models need. Experts that Liger replaces run on a GPU alone."""


@triton.jit
def _rsqrt(x):
    return 1 / tl.sqrt(x)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def _complete_the_interpreter(monkeypatch):
    """Triton's interpreter lacks what Liger's RMSNorm, SwiGLU, GeGLU and capped loss use."""
    convert = interpreter._implicit_cvt

    def with_floats(argument):
        # As an integer, a number with a point is a tensor inside a kernel.
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    # Liger takes those of CUDA's libdevice.
    monkeypatch.setattr(sys.modules["liger_kernel.ops.rms_norm"], "rsqrt", _rsqrt)
    for name in ("cross_entropy", "geglu"):
        monkeypatch.setattr(sys.modules[f"liger_kernel.ops.{name}"], "tanh", _tanh)


@pytest.fixture
def liger(monkeypatch):
    """Liger where its kernels run; what it changes of transformers is undone."""
    pytest.importorskip("liger_kernel.transformers")
    for kind in (*KINDS, *OTHERS):
        modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in list(vars(modeling)):
            if name.endswith(("RMSNorm", "MLP")) or name == "apply_rotary_pos_emb":
                monkeypatch.setattr(modeling, name, getattr(modeling, name))
    if not GPU:
        _complete_the_interpreter(monkeypatch)


@pytest.fixture
def few(row):
    """A row of 27 tokens: the interpreter is slow."""
    row = {name: tensor[:, :27].clone() for name, tensor in row.items()}
    row["position_ids"][0, 22:] -= 22
    return row


@pytest.fixture
def small(tiny):
    """A model of one layer that drops keys of so few tokens."""

    def build(kind="llama", **config):
        model = tiny(kind, num_hidden_layers=1, **config)
        return sparsify(model, Budget.fixed(8, sink=2, local=0.0), block=2, tile=2)

    return build


@pytest.mark.usefixtures("liger")
@pytest.mark.skipif(GPU, reason="a GPU's products are not exact enough; see test_on_a_gpu")
class TestInterpreted:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("scale", [1.0, 2.0**10])
    def test_loss(self, tiny, row, train, assert_same, tied, scale):
        model = tiny(tie_word_embeddings=tied)
        plain = train(model, row, scale=scale)
        assert_same(train(model, row, LOSS, scale), plain)

    def test_loss_of_capped_logits(self, tiny, row, train, assert_same):
        model = tiny("gemma2", head_dim=8, final_logit_softcapping=2.0)
        plain = train(model, row, partial(summed_loss, kind="chunked"))
        assert_same(train(model, row, LOSS), plain, tolerance=1e-5)

    @pytest.mark.parametrize("learns", ["lm_head", "model."])
    def test_parts_that_are_frozen(self, tiny, row, train, assert_same, learns):
        model = tiny()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns in name)
        plain = train(model, row)
        assert_same(train(model, row, LOSS), plain)

    def test_nothing_to_predict_is_zero_and_has_a_gradient(self, tiny, row, train):
        row["labels"].fill_(-100)
        total, gradients = train(tiny(), row, LOSS)
        assert total == 0
        assert all((gradient == 0).all() for gradient in gradients.values())

    def test_the_logits_of_a_whole_row_never_exist(self, tiny, row, train, rows_of, vocabulary):
        with rows_of(vocabulary) as found:
            train(tiny(), row, LOSS)
        # Liger's chunks: logits are as large as the hidden states, to a power of two of tokens.
        assert found.rows <= 128

    def test_the_head_is_as_before(self, tiny, row, train):
        model, hidden = tiny(), torch.randn(1, 3, 32)
        before = model.lm_head(hidden)
        train(model, row, LOSS)
        assert torch.equal(model.lm_head(hidden), before)

    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    def test_kernels_follow_a_change_of_rope(self, small, few, train, assert_same, kind):
        changed = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
        model = small(kind)
        set_rope(model, **changed)
        plain = train(model, few)
        model = small(kind)
        use_liger_kernels(model)
        set_rope(model, **changed)
        assert_same(train(model, few), plain, tolerance=5e-6)
        assert is_sparse(model)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", OTHERS)
    def test_kernels_of_other_families(self, small, few, train, assert_same, kind):
        model = small("gemma3_text" if kind == "gemma3" else kind, **OTHERS[kind])
        plain = train(model, few)
        use_liger_kernels(model)
        assert_same(train(model, few), plain, tolerance=1e-5)

    def test_all_of_it_together(self, small, few, train, assert_same):
        pytest.importorskip("deepspeed")
        model = small()
        plain = train(model, few)
        use_liger_kernels(model)
        tile_mlps(model, 3)
        set_activations(model, "offload")
        assert_same(train(model, few, LOSS), plain, tolerance=5e-6)

    @pytest.mark.slow
    def test_adapters(self, small, few, train, assert_same):
        model = small()
        plain = add_lora(copy.deepcopy(model), ADAPTERS)
        use_liger_kernels(model)
        add_lora(model, ADAPTERS)
        for name, weight in [*plain.named_parameters(), *model.named_parameters()]:
            if ".lora_B." in name:
                weight.data = torch.linspace(-0.5, 0.5, weight.numel()).view(weight.shape)
        assert_same(train(model, few, LOSS), train(plain, few), tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(tiny, row, train, kind, kernels, dtype):
    """Gradients err at most three times as much as PyTorch's in the same precision."""
    row = {name: tensor.to(DEVICE) for name, tensor in row.items()}
    model = unsparsify(tiny(kind)).to(DEVICE, torch.float64)
    _, exact = train(model, row)
    model.to(dtype)
    _, plain = train(model, row)
    if kernels:
        use_liger_kernels(model)
    _, ours = train(model, row, LOSS)

    def error(gradients, name):
        return ((gradients[name].double() - exact[name]).norm() / exact[name].norm()).item()

    for name in exact:
        assert error(ours, name) <= 3 * max(error(plain, name), 1e-6), name


@pytest.mark.parametrize("options", [{"loss": "liger"}, {"liger_kernels": True}])
def test_a_machine_without_a_gpu(architecture, monkeypatch, options):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    key = next(iter(options))
    with pytest.raises(ValueError, match=rf"model.{key}.* runs on CUDA GPUs only"):
        SparseLM(architecture=architecture, **options)


@pytest.mark.parametrize("options", [{"loss": "liger"}, {"liger_kernels": True}])
def test_without_liger(architecture, monkeypatch, options):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    key = next(iter(options))
    with pytest.raises(ValueError, match=rf"model.{key}.* needs liger-kernel: pip install"):
        SparseLM(architecture=architecture, **options)
