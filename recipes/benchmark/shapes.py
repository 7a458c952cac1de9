"""Shapes of models whose training step is timed: real ones, and one for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama without its weights.

    Args:
        name: of `SHAPES`.
        layers: how many run where nobody says otherwise.
        whole: how many the model has.
        architecture: of transformers' LlamaConfig, but for the number of layers.
    """

    name: str
    layers: int
    whole: int
    architecture: dict[str, Any]

    def config(self, layers: int, length: int) -> dict[str, Any]:
        """`model.architecture` of a SparseLM with so many layers, for rows of `length` tokens."""
        return {
            "model_type": "llama",
            "num_hidden_layers": layers,
            "max_position_embeddings": length,
            "rope_theta": 500_000.0,
            "bos_token_id": None,
            "eos_token_id": None,
            **self.architecture,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llama3.2-1b",
            layers=16,
            whole=16,
            architecture={
                "vocab_size": 128_256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "tie_word_embeddings": True,
            },
        ),
        # With 8 layers weights, gradients and AdamW in bfloat16 leave most of 80 GB to activations.
        Shape(
            "llama3-8b",
            layers=8,
            whole=32,
            architecture={
                "vocab_size": 128_256,
                "hidden_size": 4096,
                "intermediate_size": 14_336,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": False,
            },
        ),
        # Llama 3 8B with an eighth of its width, heads and MLP, a 16th of its layers and a 128th of
        # its vocabulary: MLP and head keep their shares of what is not attention. The share of
        # attention goes with length / width, so that 16k tokens are to it what 128k are to the 8B.
        Shape(
            "small",
            layers=2,
            whole=2,
            architecture={
                "vocab_size": 1002,
                "hidden_size": 512,
                "intermediate_size": 1792,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 128,
                "tie_word_embeddings": False,
            },
        ),
    )
}
