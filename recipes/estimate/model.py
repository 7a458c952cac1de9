"""A model from its config alone: how many parameters it has, and where they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_sparse.models import build_model, check_support, pretrained_config


@dataclass(frozen=True)
class Model:
    """A transformers model without its weights.

    Args:
        config: of transformers.
        parameters: all of them; tied ones count once.
        matrices: parameters of the layers that every token is multiplied with: neither embeddings,
            nor norms, biases and the head.
        head: parameters of the language-model head.
        mlp: parameters of all MLPs.
        largest: parameters of the largest module that has any itself.
    """

    config: Any
    parameters: int
    matrices: int
    head: int
    mlp: int
    largest: int

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

    def shallow(self, layers: int) -> Any:
        """Its config with fewer layers and a vocabulary of no size to speak of."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 8, None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return config


def read_model(pretrained: str | None, architecture: Mapping[str, Any] | None) -> Model:
    """Count the parameters of a model that is built on the meta device; no weights are read.

    Raises:
        ValueError: the config of no model that sparse attention knows.
        NotImplementedError: a layer has what sparse attention has not.
    """
    with torch.device("meta"):
        if pretrained is not None and architecture is None:
            from transformers import AutoModelForCausalLM

            model: Any = AutoModelForCausalLM.from_config(pretrained_config(pretrained))
        else:
            model = build_model(pretrained, architecture)
    check_support(model)
    layers = model.base_model.layers
    return Model(
        config=model.config,
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=sum(p.numel() for p in layers.parameters() if p.dim() > 1),
        head=model.get_output_embeddings().weight.numel(),
        mlp=sum(_size(layer.mlp) for layer in layers),
        largest=max(_size(module, recurse=False) for module in model.modules()),
    )


def _size(module: nn.Module, recurse: bool = True) -> int:
    return sum(p.numel() for p in module.parameters(recurse))
