"""Weights that the base of the studies starts from: random ones that hold an induction circuit.

From random weights a model this small does not learn to look anything up within the few million
tokens that minutes on a CPU allow (on how induction heads form: Olsson et al., arXiv 2209.11895).
So the circuit is written into its first two layers: a token attends to those that came after an
earlier occurrence of it, and finds them likely to come next. It knows nothing of any task, and
training is free to change it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.models import build_model

# The residual stream of 128: a constant, a code of the token (63), and those of the tokens one and
# two before it (32 each, projections of the code).
_OWN, _ONE_BEFORE, _TWO_BEFORE = slice(1, 64), slice(64, 96), slice(96, 128)
_OWN_SIZE = 63

_SHARP = 1.5
"""Of the heads that look back by position."""
_MATCH = 3.5
"""Of the heads that look for the same token."""
_PREDICT = 0.15
"""How much of what they find goes into the prediction."""
_OTHERS = 0.3
"""Random weights of these layers, as a share of what they are initialised to."""


@torch.no_grad()
def write_start(architecture: dict[str, Any], directory: Path, seed: int) -> None:
    """Write a Llama with the circuit as a Hugging Face directory.

    Args:
        architecture: of 128 dimensions, two or more layers, 4 query and 2 key-value heads of 32,
            default RoPE, embeddings that are not tied.
        directory: written to.
        seed: of all that is random.
    """
    torch.manual_seed(seed)
    model: Any = build_model(architecture=architecture)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    codes = torch.randn(len(embedding), _OWN_SIZE) / math.sqrt(_OWN_SIZE + 1)
    embedding.zero_()
    embedding[:, 0], embedding[:, _OWN] = 1.0, codes
    head.zero_()
    head[:, _OWN] = 0.3 * codes
    for layer in model.model.layers[:2]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).weight.mul_(_OTHERS)
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    code = _projection(first.head_dim)
    _look_back(first, code, model.config.rope_parameters["rope_theta"])
    _look_up(second, code)
    model.save_pretrained(directory)


def _look_back(attention: Any, code: Tensor, theta: float) -> None:
    """By position alone, the query heads attend 1, 2, 1 and 3 tokens back; the first two write what
    they find there into the stream.
    """
    size = attention.head_dim
    # The constant dimension, as the normalised embedding has it.
    constant = math.sqrt(128 / (1 + _OWN_SIZE / (_OWN_SIZE + 1)))
    fast = (torch.arange(size) < size // 4).float()  # frequencies that tell neighbours apart
    gain = _SHARP * math.sqrt(3.2 * math.sqrt(size)) / constant
    for number, distance in enumerate((1, 2, 1, 3)):
        _rows(attention.q_proj, number, size)[:, 0] = gain * _turned(fast, -distance, theta)
    for number in range(2):
        _rows(attention.k_proj, number, size)[:, 0] = gain * fast
        _rows(attention.v_proj, number, size)[:, _OWN] = code
    for number, place in enumerate((_ONE_BEFORE, _TWO_BEFORE)):
        columns = slice(number * size, (number + 1) * size)
        attention.o_proj.weight[place, columns] = torch.eye(size) / constant


def _look_up(attention: Any, code: Tensor) -> None:
    """Two query heads look for keys that come after the token that they are at, two for keys that
    come two after the token before; all of them predict the token of the key.
    """
    size = attention.head_dim
    half = size // 2
    # Frequencies that hardly turn within the context, so that the distance does not matter.
    slow = [i for i in range(size) if i % half >= 5 * half // 8]
    found = _projection(size)
    for number in range(4):
        rows = _rows(attention.q_proj, number, size)
        for i, dimension in enumerate(slow):
            if number < 2:
                rows[dimension, _OWN] = _MATCH * code[i]
            else:
                rows[dimension, _ONE_BEFORE.start + i] = _MATCH
        columns = slice(number * size, (number + 1) * size)
        attention.o_proj.weight[_OWN, columns] = _PREDICT * found.T
    for number, place in enumerate((_ONE_BEFORE, _TWO_BEFORE)):
        _rows(attention.v_proj, number, size)[:, _OWN] = found
        for i, dimension in enumerate(slow):
            _rows(attention.k_proj, number, size)[dimension, place.start + i] = _MATCH


def _rows(projection: Any, head: int, size: int) -> Tensor:
    """A view on a head's part of a projection's weight, [size, hidden]."""
    return projection.weight[head * size : (head + 1) * size]


def _projection(size: int) -> Tensor:
    """Random orthonormal rows [size, code]."""
    return torch.linalg.qr(torch.randn(_OWN_SIZE, size))[0].T


def _turned(vector: Tensor, tokens: int, theta: float) -> Tensor:
    """A vector of a head rotated by RoPE, by so many tokens."""
    half = len(vector) // 2
    angle = tokens * theta ** (-torch.arange(half) / half)
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
