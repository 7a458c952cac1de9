"""How a model is brought to collapse, and what is said to mend it, done to a Llama's weights."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_sparse.models import attention_layers
from lit_sparse.recipes.benchmark.report import BadArgument

_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Keys of a Llama's config that mean the same in Qwen3's."""


@torch.no_grad()
def scale_logits(model: nn.Module, factor: float) -> None:
    """Multiply all attention logits of a model without QK-norm by a factor, queries and keys by
    its square root each: temperature, above 1 towards concentration, below towards dispersion.
    """
    for _, module in attention_layers(model):
        for projection in (cast(Any, module).q_proj, cast(Any, module).k_proj):
            for parameter in projection.parameters():
                parameter *= math.sqrt(factor)


def check_llama(model: Any) -> None:
    """Raise BadArgument unless Qwen3 can hold the model's weights."""
    if model.config.model_type != "llama" or model.config.mlp_bias:
        raise BadArgument(
            "collapse carries MODEL's weights into Qwen3 for QK-norm: that takes a Llama without "
            f"biases in its MLP, and this is a {model.config.model_type}"
        )


def with_qk_norm(model: Any, bound: float) -> Any:
    """A Qwen3 of a Llama's weights: RMSNorm of each head's queries and keys, before RoPE.

    Args:
        bound: no logit is larger, whatever W_Q and W_K are: the gains are sqrt(bound /
            sqrt(head_dim)) each. They train; Qwen3's start at 1, a bound of sqrt(head_dim).

    Raises:
        BadArgument: see `check_llama`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    check_llama(model)
    config = Qwen3Config(**{key: getattr(model.config, key) for key in _KEPT})
    normed = Qwen3ForCausalLM(config)
    missing, unexpected = normed.load_state_dict(model.state_dict(), strict=False)
    gains = [gain for name, gain in normed.named_parameters() if name in missing]
    # Only the gains are new.
    assert not unexpected
    assert len(gains) == len(missing) == 2 * config.num_hidden_layers
    for gain in gains:
        torch.nn.init.constant_(gain, math.sqrt(bound / math.sqrt(config.head_dim)))
    return normed


class LengthScaling:
    """Length-scaled softmax: the queries of a row that sees n keys, times ln n / ln n_ref.

    At n_ref the model is what it was; longer rows get larger logits, so that a softmax over more
    keys stays as sharp (Gaussian logits keep their gamma only if sigma grows with sqrt(ln n)).
    Source: s ln n with a fixed s = 1 / ln n_ref; "Scalable-Softmax" (arXiv 2501.19399) learns s,
    which W_Q does here. It acts as hooks on the query projections until `remove`.

    Args:
        model: without QK-norm, which would undo it.
        reference: n_ref, at least 2.
    """

    def __init__(self, model: nn.Module, reference: int) -> None:
        self.reference = reference
        self._handles: list[RemovableHandle] = []
        self._factor = torch.ones(())
        for _, module in attention_layers(model):
            attention = cast(Any, module)
            self._handles += [
                attention.register_forward_pre_hook(self._see, with_kwargs=True),
                attention.q_proj.register_forward_hook(self._scale),
            ]

    def factor(self, position: Tensor) -> Tensor:
        """Of positions from 0 in a document, which see as many keys and one: any shape."""
        return (position + 1).clamp(min=1).double().log() / math.log(self.reference)

    def remove(self) -> None:
        """Be gone from the model."""
        for handle in self._handles:
            handle.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._factor = self.factor(kwargs["position_ids"])

    def _scale(self, module: nn.Module, args: Any, queries: Tensor) -> Tensor:
        # RoPE turns what comes out of the projection, and turning keeps a factor.
        return queries * self._factor.to(queries)[..., None]
