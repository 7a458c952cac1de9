"""A tiny sparse model on a packed row, and what memory features must not change: its gradients."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from lit_sparse import Budget, sparsify

VOCABULARY = 151
"""A size that nothing else in the model has."""

INNER = 88
"""Width of the MLP; nothing else has it either."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """Builds a random model of two layers whose attention drops keys of the packed row."""

    def build(kind="llama", **config):
        torch.manual_seed(0)
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            # Logits so flat as a new model's would hide errors of attention.
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **{"qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}.get(kind, {}),
            **config,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        return sparsify(model, Budget.fixed(64, sink=16, local=0.25), block=16, tile=16)

    return build


@pytest.fixture
def row():
    """Three packed documents, 221 tokens; every third token is not learned."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.cat([torch.arange(n) for n in (150, 1, 70)])[None]
    ids, labels = torch.randint(VOCABULARY, (2, *positions.shape), generator=generator)
    labels[0, ::3] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


@pytest.fixture
def plain_loss():
    """The summed cross entropy from the logits of the whole row."""

    def loss(model, hidden, labels):
        logits = model.get_output_embeddings()(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    return loss


@pytest.fixture
def train(plain_loss):
    """Runs a model on a row; gives its loss and the gradients of its parameters by name."""

    def run(model, row, loss=plain_loss, scale=0.01, forward=nullcontext):
        model.zero_grad()
        with forward():
            hidden = model.base_model(
                input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False
            ).last_hidden_state
            total = loss(model, hidden, row["labels"])
        (total * scale).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return total.detach(), grads

    return run


@pytest.fixture
def train_and_save(train):
    """What `train` gives, and the bytes that its forward leaves for the backward, weights apart."""

    def run(model, row, **options):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}  # storages, held so that no address comes twice

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        hooks = partial(saved_tensors_hooks, pack, lambda tensor: tensor)
        result = train(model, row, forward=hooks, **options)
        return result, sum(storage.nbytes() for storage in kept.values())

    return run


@pytest.fixture
def assert_same():
    """Holds two results of `train` against each other, by relative norms."""

    def check(ours, plain, tolerance=1e-6):
        torch.testing.assert_close(ours[0], plain[0], rtol=tolerance, atol=0)
        assert ours[1].keys() == plain[1].keys()
        for name, gradient in plain[1].items():
            assert gradient.norm() > 0, name
            error = (ours[1][name] - gradient).norm() / gradient.norm()
            assert error <= tolerance, f"{name}: {error}"

    return check


class Widths(TorchDispatchMode):
    """Rows of the largest tensor with a last dimension of `width` that is computed: `rows`."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == self.width:
                self.rows = max(self.rows, x.numel() // self.width)
        return out


@pytest.fixture
def rows_of():
    """`with rows_of(width) as found` counts in `found.rows`."""
    return Widths


@pytest.fixture
def inner():
    return INNER


@pytest.fixture
def vocabulary():
    return VOCABULARY
