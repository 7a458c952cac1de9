"""A training step on tensors without memory: how many bytes are alive, when, and what for.

The modules are transformers' and the loss is ours, so that what they save, cast and compute again
needs no formula. One or two layers are enough: what each further one keeps is the same.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_sparse.attention.plan import Plan
from lit_sparse.models.head import capped
from lit_sparse.models.lora.adapters import LoRA, add_lora
from lit_sparse.recipes.estimate.attention import Counted, count_attention
from lit_sparse.recipes.estimate.live import Bytes, LiveBytes
from lit_sparse.recipes.estimate.model import Model
from lit_sparse.training.activations import set_activations
from lit_sparse.training.loss import chunked_cross_entropy
from lit_sparse.training.tiled import tile_mlps, tiled_cross_entropy


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a step, besides model and tokens.

    Args:
        dtype: of the weights.
        autocast: whether products run in bfloat16 beside weights of float32 (Lightning's
            bf16-mixed, where DeepSpeed does not cast the model).
        recompute: whether a layer keeps its input alone (activation checkpointing).
        tiled_mlp: parts of the row that an MLP computes one after the other; None: all at once.
        loss: "chunked", "tiled" or "liger".
        loss_chunk: tokens whose logits exist at a time.
    """

    dtype: torch.dtype
    autocast: bool = False
    recompute: bool = False
    tiled_mlp: int | None = None
    loss: str = "chunked"
    loss_chunk: int = 1024


@dataclass(frozen=True)
class DecoderBytes:
    """Bytes of forward and backward on the part of a row that one rank computes.

    Weights and their gradients do not count, but for a gradient that is being computed.

    Args:
        once: kept for the backward whatever the number of layers is.
        layer: kept by each layer.
        work: what the largest moment of the backward has more than that.
    """

    once: Bytes
    layer: Bytes
    work: Bytes


def decoder_bytes(model: Model, recipe: Recipe, plan: Plan, sequence: int) -> DecoderBytes:
    """Of all but the head, with the attention of `plan` (of the whole row) in every layer.

    Args:
        sequence: ranks that share the row.
    """
    tokens = plan.queries[-1] // sequence
    kept: list[Bytes] = []
    for layers in (2, 1):
        decoder = _decoder(model, recipe, layers)
        with _without_memory(decoder), LiveBytes() as live:
            count_attention(decoder, Counted.of(live, plan, sequence))
            hidden = _forward(decoder, recipe, tokens)
            kept.append(Counter(live.now))
            if layers == 1:
                loss = _Loss.apply(hidden)
                del hidden
                live.forget_peak()
                loss.backward()
    two, one = kept
    layer = difference(two, one)
    return DecoderBytes(difference(one, layer), layer, difference(live.peak, one))


def prefill_bytes(model: Model, recipe: Recipe, plan: Plan) -> int:
    """The largest moment of a forward without gradients, beside weights and key-value cache."""
    decoder = _decoder(model, recipe, layers=1)
    with _without_memory(decoder), torch.no_grad(), LiveBytes() as live:
        count_attention(decoder, Counted.of(live, plan))
        _forward(decoder, recipe, plan.queries[-1])
    return live.peak.total()


def loss_bytes(model: Model, recipe: Recipe, tokens: int) -> int:
    """The largest moment of the head and the loss, beside the last hidden states."""
    if recipe.loss == "liger":
        return _liger_bytes(model, recipe, tokens)
    chunks = -(-tokens // recipe.loss_chunk)
    if chunks <= 3:
        return _chunked_bytes(model, recipe, tokens)
    # Every further chunk adds the gradient of its hidden states.
    two, three = (_chunked_bytes(model, recipe, n * recipe.loss_chunk) for n in (2, 3))
    return three + (chunks - 3) * (three - two)


def _chunked_bytes(model: Model, recipe: Recipe, tokens: int) -> int:
    cross_entropy = tiled_cross_entropy if recipe.loss == "tiled" else chunked_cross_entropy
    with _without_memory():
        head = nn.Linear(model.hidden, model.vocabulary, bias=False, dtype=recipe.dtype)
        _free_gradients(head.requires_grad_(model.trains_head))
        hidden = torch.empty(tokens, model.hidden, dtype=recipe.dtype, requires_grad=True)
        labels = torch.zeros(tokens, dtype=torch.int64)
        with LiveBytes("logits") as live:
            with _autocast(recipe):
                loss = cross_entropy(hidden, capped(head, model.config), labels, recipe.loss_chunk)
            loss.backward()
    return live.peak.total()


def _liger_bytes(model: Model, recipe: Recipe, tokens: int) -> int:
    """Liger's fused linear cross entropy (arXiv 2410.10989): gradients of hidden states and head
    are made in the forward, from the logits of a chunk that is as large as the hidden states.
    """
    shrink = -(-model.vocabulary // model.hidden)
    rows = 2 ** (-(-tokens // shrink) - 1).bit_length()
    gradient = model.head if model.trains_head else 0
    numbers = tokens * model.hidden + gradient + rows * model.vocabulary
    return numbers * recipe.dtype.itemsize + 4 * tokens


def difference(a: Bytes, b: Bytes) -> Bytes:
    """a - b, which a Counter would cut at 0."""
    return Counter({name: a[name] - b[name] for name in a | b})


@contextmanager
def _without_memory(module: nn.Module | None = None) -> Iterator[None]:
    """Inside, tensors of the CPU have no memory; so have the weights of a module that comes from
    the meta device.
    """
    # The tables of a plan come from the host as they are.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules() if module is not None else ():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="cpu")
                    part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty_like(buffer, device="cpu")
        if module is not None:
            _free_gradients(module)
        yield


def _decoder(model: Model, recipe: Recipe, layers: int) -> Any:
    """On the meta device.

    Raises:
        NotImplementedError: products of experts that PyTorch has in bfloat16 alone.
    """
    from transformers import AutoModel

    if model.experts is not None and recipe.dtype != torch.bfloat16:
        raise NotImplementedError(
            "a model of experts is estimated with weights in bfloat16 alone: take "
            "trainer.precision bf16-true"
        )

    with torch.device("meta"):
        decoder: Any = AutoModel.from_config(model.shallow(layers), dtype=recipe.dtype).train()
    if recipe.tiled_mlp is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to guess
        tile_mlps(decoder, recipe.tiled_mlp)
    if model.lora is not None:
        add_lora(decoder, _of_decoder(model.lora, decoder))
        if not recipe.autocast:  # DeepSpeed casts all
            decoder.to(recipe.dtype)
    set_activations(decoder, "recompute" if recipe.recompute else "keep")
    return decoder


def _of_decoder(lora: LoRA, decoder: nn.Module) -> LoRA:
    """Without a target that is the head, which a decoder has not."""
    if not isinstance(lora.targets, list):
        return lora
    names = [
        f".{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
    ]
    targets = [t for t in lora.targets if any(name.endswith(f".{t}") for name in names)]
    if not targets:
        raise NotImplementedError(
            "model.lora.targets: adapters of the head alone are not estimated"
        )
    return replace(lora, targets=targets)


def _forward(decoder: Any, recipe: Recipe, tokens: int) -> Tensor:
    ids, positions = (torch.zeros(1, tokens, dtype=torch.int64) for _ in range(2))
    # transformers passes a 4D mask on as it is; without one it would look for padding and
    # documents in the data.
    mask = torch.zeros(1, 1, 1, 1)
    with _autocast(recipe):
        return decoder(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state


def _autocast(recipe: Recipe) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast)


def _free_gradients(module: nn.Module) -> None:
    """Have the gradients of a module go as soon as they are whole: they count elsewhere."""
    for parameter in filter(lambda p: p.requires_grad, module.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


class _Loss(torch.autograd.Function):
    """Stands for the loss: its backward gives the gradient of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)
