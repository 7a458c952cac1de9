"""Cross entropy of long rows without their logits: [tokens, vocabulary] never exists as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


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
            total = total + checkpoint(_sum, part, head, target, use_reentrant=False)
        else:
            total = total + _sum(part, head, target)
    return total


def _sum(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORED, reduction="sum")
