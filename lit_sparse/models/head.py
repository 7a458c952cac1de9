"""The language-model head as the model's own forward has it: from hidden states to logits."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


class CappedHead(nn.Module):
    """A head whose logits are cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2).

    Args:
        head: hidden states [..., D] -> logits [..., vocabulary]; its parameters are those of this.
        cap: the largest absolute logit.
    """

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.head(hidden) / self.cap).tanh() * self.cap


def language_head(model: nn.Module) -> nn.Module:
    """What turns the last hidden states of a causal language model into its logits.

    The output embeddings are not all of it: Gemma 2 caps the logits (final_logit_softcapping).
    """
    return capped(cast(Any, model).get_output_embeddings(), cast(Any, model).config)


def capped(head: nn.Module, config: Any) -> nn.Module:
    """A head with the cap that a transformers config has, or the head itself."""
    cap = getattr(config, "final_logit_softcapping", None)
    return head if cap is None else CappedHead(head, cap)
