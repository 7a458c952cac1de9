"""A model from its config alone: how many parameters it has, and where they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_sparse.models import check_support, model_config
from lit_sparse.models.lora import LoRA, add_lora


@dataclass(frozen=True)
class Model:
    """A transformers model without its weights.

    Args:
        config: of transformers.
        parameters: all of them; tied ones count once.
        trained: of them, those that an optimizer changes.
        matrices: parameters of the layers that every token is multiplied with: neither embeddings,
            nor norms, biases and the head.
        trained_matrices: of them, likewise.
        head: parameters of the language-model head.
        trains_head: whether it is trained.
        mlp: parameters of all MLPs.
        largest: parameters of the largest module that has any itself.
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

    def shallow(self, layers: int) -> Any:
        """Its config with fewer layers and a vocabulary of no size to speak of."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 8, None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
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
    from transformers import AutoModelForCausalLM

    config = model_config(pretrained, architecture, trust_remote_code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    check_support(model)
    if lora is not None:
        add_lora(model, lora)
    layers = model.base_model.layers
    matrices = [p for p in layers.parameters() if p.dim() > 1]
    head = model.get_output_embeddings().weight
    return Model(
        config=model.config,
        parameters=_size(model.parameters()),
        trained=_size(p for p in model.parameters() if p.requires_grad),
        matrices=_size(matrices),
        trained_matrices=_size(p for p in matrices if p.requires_grad),
        head=head.numel(),
        trains_head=head.requires_grad,
        mlp=sum(_size(layer.mlp.parameters()) for layer in layers),
        largest=max(_size(module.parameters(recurse=False)) for module in model.modules()),
        lora=lora,
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
