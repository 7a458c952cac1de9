"""Cross entropy of long rows without their logits: [tokens, vocabulary] never exists as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_sparse.models.head import language_head

IGNORED = -100

Loss = Literal["chunked", "tiled", "liger"]
"""How the logits of a whole row are avoided."""


def check_loss(kind: str, config: Any = None) -> None:
    """Refuse, before any work, a loss that is not known or that this machine cannot compute.

    Args:
        kind: the setting.
        config: of the transformers model.

    Raises:
        ValueError: another name, a library or a GPU that is missing, or a config that asks for more
            than cross entropy.
    """
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "the model's config has output_router_logits: true, by which transformers adds a loss "
            "that balances experts; model.loss is cross entropy alone and would leave it out: set "
            "output_router_logits: false in the config.json of model.pretrained, or in "
            "model.architecture"
        )
    if kind not in get_args(Loss):
        raise ValueError(f"model.loss must be one of {', '.join(get_args(Loss))}, got {kind!r}")
    if kind == "tiled":
        from lit_sparse.training.tiled import require_deepspeed

        require_deepspeed("model.loss: tiled")
    if kind == "liger":
        from lit_sparse.training.liger import require_liger

        require_liger("model.loss: liger", torch.cuda.is_available())


def summed_loss(
    model: nn.Module, hidden: Tensor, labels: Tensor, kind: str = "chunked", chunk: int = 1024
) -> Tensor:
    """Summed cross entropy, in nats, of a causal language model's last hidden states.

    Args:
        model: a transformers model; its head turns hidden states into logits.
        hidden: [..., D].
        labels: int64 [...], already shifted; -100 is not counted.
        kind: "chunked": by activation checkpointing. "tiled": by DeepSpeed's tiled computation,
            which computes the same. "liger": by Liger's fused kernel, on CUDA.
        chunk: tokens whose logits exist at a time; Liger chooses by itself.

    Returns:
        float32 scalar; 0, connected to `hidden`, if nothing is counted. It may be scaled: the
        gradients of the head follow.
    """
    head = language_head(model)
    if kind == "liger":
        from lit_sparse.training.liger import liger_cross_entropy

        return liger_cross_entropy(hidden, head, labels)
    if kind == "tiled":
        from lit_sparse.training.tiled import tiled_cross_entropy

        own: Any = model
        tied = own.get_output_embeddings().weight is own.get_input_embeddings().weight
        return tiled_cross_entropy(hidden, head, labels, chunk, tied)
    return chunked_cross_entropy(hidden, head, labels, chunk)


def chunked_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk: int = 1024
) -> Tensor:
    """Summed cross entropy, in nats, of labels that are already shifted.

    The logits of `chunk` tokens exist at a time: the backward computes them again.

    Args:
        hidden: [..., D], last hidden states.
        head: the language-model head, [N, D] -> logits [N, vocabulary].
        labels: int64 [...]; -100 is not counted.
        chunk: tokens.

    Returns:
        float32 scalar; 0, connected to `hidden`, if nothing is counted.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(sum_cross_entropy, part, head, target, use_reentrant=False)
        else:
            total = total + sum_cross_entropy(part, head, target)
    return total


def sum_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """The plain one, of hidden states [N, D] and labels [N]: logits [N, vocabulary] exist."""
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")


def differentiable(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x`, for computations that give parameters a gradient only if their input has one."""
    if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in parameters):
        return x.detach().requires_grad_()
    return x
