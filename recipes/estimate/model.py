"""A model from its config alone: how many parameters it has, and where they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_sparse.models import (
    attention_layers,
    check_support,
    model_config,
    model_without_weights,
    window_of,
)
from lit_sparse.models.lora.adapters import LoRA, add_lora


@dataclass(frozen=True)
class Model:
    """A transformers model without its weights.

    Args:
        config: of transformers.
        parameters: all of them; tied ones count once.
        trained: of them, those that an optimizer changes.
        matrices: parameters of the layers that a token is multiplied with: neither embeddings, nor
            norms, biases and the head; of experts those that a token is sent to.
        trained_matrices: of them, likewise.
        head: parameters of the language-model head.
        trains_head: whether it is trained.
        mlp: of them, those of all MLPs.
        largest: parameters of the largest module that has any itself.
        windows: of each layer its own sliding window in tokens; None: it obeys the law.
        lora: its adapters.
    """

    config: Any
    parameters: int
    trained: int
    matrices: int
    trained_matrices: int
    head: int
    trains_head: bool
    mlp: int
    largest: int
    windows: tuple[int | None, ...] = ()
    lora: LoRA | None = None

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads

    @property
    def hidden(self) -> int:
        return self.config.hidden_size

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def experts(self) -> int | None:
        """Experts that a token is sent to; None for a model without any."""
        return _experts(self.config)

    def shallow(self, layers: int) -> Any:
        """Its config with fewer layers and a vocabulary of no size to speak of."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 8, None
        if getattr(config, "layer_types", None):
            last = config.layer_types[-1]  # again where the model itself has fewer
            config.layer_types = [*config.layer_types, *[last] * layers][:layers]
        return config


def read_model(
    pretrained: str | None,
    architecture: Mapping[str, Any] | None,
    lora: LoRA | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Count the parameters of a model that is built on the meta device; no weights are read.

    Raises:
        ValueError: the config of no model that sparse attention knows.
        NotImplementedError: a layer has what sparse attention has not.
    """
    config = model_config(pretrained, architecture, trust_remote_code)
    model: Any = model_without_weights(config, trust_remote_code=trust_remote_code)
    check_support(model)
    if lora is not None:
        add_lora(model, lora)
    layers = model.base_model.layers
    experts = _experts(config)
    head = model.get_output_embeddings().weight
    return Model(
        config=model.config,
        parameters=_size(model.parameters()),
        trained=_size(p for p in model.parameters() if p.requires_grad),
        matrices=_multiplied(layers.parameters(), experts),
        trained_matrices=_multiplied((p for p in layers.parameters() if p.requires_grad), experts),
        head=head.numel(),
        trains_head=head.requires_grad,
        mlp=sum(_multiplied(layer.mlp.parameters(), experts) for layer in layers),
        largest=max(_size(module.parameters(recurse=False)) for module in model.modules()),
        windows=tuple(window_of(model, layer) for layer, _ in attention_layers(model)),
        lora=lora,
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _experts(config: Any) -> int | None:
    return getattr(config, "num_experts_per_tok", None)


def _multiplied(parameters: Iterable[nn.Parameter], experts: int | None) -> int:
    """The size of the matrices: of a stack [experts, ...] so many of them."""
    total = 0
    for p in parameters:
        if p.dim() == 2:
            total += p.numel()
        elif p.dim() == 3 and experts is not None:
            total += p.numel() // len(p) * experts
    return total
