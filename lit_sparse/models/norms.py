"""How large a model's logits can be, read from its weights: norms of W_Q Rot W_K^T by layer, head.

With inputs x of a layer's projections, s = scale q^T Rot k where q = W_Q^T x_i + b_q, k = W_K^T x_j
+ b_k and Rot the rotation of RoPE by the distance i - j of the two tokens (the identity for equal
positions, and without effect on a norm only there). No d_model x d_model matrix is built: with the
Gram matrices G of the projections ||W_Q Rot W_K^T||_F^2 = tr(G_Q Rot G_K Rot^T). Reconstructed, for
the claims of arXiv 2404.02690.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_sparse import theory
from lit_sparse.models.rope import frequencies
from lit_sparse.models.support import attention_layers, law_layers

NEAR = 64
"""Distances from 0 on that `distances` has one by one."""

_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LogitNorms:
    """Norms of one layer, float64 [H, distances] for H query heads, the softmax scale included; on
    the host.

    Where the layer normalises queries and keys (QK-norm) they are those of the projections before
    that, and only `ceiling` speaks about logits. A soft cap comes after all of it.
    """

    distances: Tensor
    """int64 [distances], in tokens; the first is 0."""
    weight: Tensor
    """||W||_F with W = scale W_Q Rot W_K^T: R / B^2."""
    query_bias: Tensor
    """||scale b_q Rot W_K^T||_2; 0 without a bias, as are the next two."""
    key_bias: Tensor
    """||scale W_Q Rot b_k||_2"""
    biases: Tensor
    """|scale b_q Rot b_k|"""
    ceiling: Tensor | None
    """float64 [H]: no logit of a layer with QK-norm is larger, whatever the input; else None.

    scale * head_dim * the largest product of the weights of both norms within a rotated pair of
    dimensions: normalised vectors have a length of sqrt(head_dim), and for some distance the
    rotation turns one axis of the pair into the other. Before the soft cap.
    """
    softcap: float | None = None

    @property
    def mean_weight(self) -> Tensor:
        """Root mean square of `weight` over all distances up to the last, float64 [H]."""
        span = self.distances[-1]
        if span == 0:
            return self.weight[:, 0]
        return (torch.trapezoid(self.weight**2, self.distances.double()) / span).sqrt()

    def largest_logit(self, input_scale: float, n: int, delta: float) -> Tensor:
        """M: |s| <= M for all of n pairs with probability 1 - delta, float64 [H]; `ceiling` if
        there is one. After the soft cap, where there is one.

        `theory.largest_logit_bound` at the distance where it is largest. Assumes inputs of
        independent entries of mean 0 and |x| <= input_scale; query rows enter in root mean square
        (see `theory.logit_scale`), so a single row may exceed it. With the root mean square of the
        entries for `input_scale` it is an estimate and no bound.
        """
        largest = self._largest(input_scale, n, delta) if self.ceiling is None else self.ceiling
        if self.softcap is None:
            return largest
        return self.softcap * (largest / self.softcap).tanh()

    def _largest(self, input_scale: float, n: int, delta: float) -> Tensor:
        of_weight = theory.logit_scale(input_scale, self.weight)
        scale = of_weight.hypot(input_scale * self.query_bias)
        offset = self.biases.hypot(input_scale * self.key_bias)
        return (theory.largest_logit_bound(scale, n, delta) + offset).amax(-1)


def distances(context: int, count: int = 256) -> Tensor:
    """The distances below `context` at which norms are looked at: the first NEAR, then up to
    `count` even ones to the last; int64, ascending.
    """
    near = torch.arange(min(NEAR, context))
    far = torch.linspace(0, context - 1, min(count, context), dtype=torch.float64).round().long()
    return torch.cat([near, far]).unique()


@torch.no_grad()
def logit_norms(model: nn.Module, at: Tensor) -> dict[int, LogitNorms]:
    """Layer number -> norms, of the layers of a supported model that obey a law, in order.

    Args:
        model: its rotation is taken as it stands: a "dynamic" one follows the last forward.
        at: distances in tokens, int64, the first of them 0; see `distances`.

    Raises:
        ValueError: not a model whose layers are known.
    """
    obeying, (inverse, scaling) = law_layers(model), frequencies(model)
    angles = at.to(inverse.device)[:, None] * inverse.double()
    # A key stands `distance` tokens before its query. YaRN scales both of them.
    rotation = (angles.cos().repeat(1, 2), -angles.sin().repeat(1, 2))
    return {
        layer: _norms(cast(Any, module), at, rotation, scaling)
        for layer, module in attention_layers(model)
        if layer in obeying
    }


def query_projection(module: nn.Module) -> nn.Linear:
    """What gives an attention module its queries; in Phi-3 keys and values, too."""
    return cast(Any, module).qkv_proj if hasattr(module, "qkv_proj") else cast(Any, module).q_proj


def _query_and_key(module: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [heads * dim, d_model] and bias of the two projections."""
    if not hasattr(module, "qkv_proj"):
        return [(x.weight, x.bias) for x in (module.q_proj, module.k_proj)]
    config = module.config
    counts = (config.num_attention_heads, 2 * config.num_key_value_heads)
    query, both = module.qkv_proj.weight.split([n * module.head_dim for n in counts])
    return [(query, None), (both.chunk(2)[0], None)]


def _norms(module: Any, at: Tensor, rotation: tuple[Tensor, Tensor], scaling: float) -> LogitNorms:
    dim, groups = module.head_dim, module.num_key_value_groups
    rotated = rotation[0].shape[1]
    # What is not rotated is not scaled by YaRN either: head_dim - rotated dimensions.
    size = torch.ones(dim, dtype=torch.float64, device=rotation[0].device)
    size[:rotated] = scaling

    def grams(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """[heads, dim, dim] of the weight, and of the bias as a single input."""
        weight = weight.unflatten(0, (-1, dim)).double() * size[:, None]
        of_weight = weight @ weight.mT
        if bias is None:
            return of_weight, torch.zeros_like(of_weight)
        bias = bias.unflatten(0, (-1, dim)).double() * size
        return of_weight, bias[:, :, None] * bias[:, None, :]

    scale = module.scaling
    (q, q_bias), (k, k_bias) = (grams(*each) for each in _query_and_key(module))
    queries = torch.stack([q, q_bias], 1).unflatten(0, (-1, groups))
    # [Hkv, G, of weight or bias of q, of weight or bias of k, distances]
    squares = torch.stack([_rotated(queries, x, rotation) for x in (k, k_bias)], -2)
    norms = scale * squares.clamp(min=0).sqrt().flatten(0, 1).cpu()
    (weight, key_bias), (query_bias, biases) = (x.unbind(1) for x in norms.unbind(1))
    ceiling = None
    if hasattr(module, "q_norm"):
        # Of equal entries a norm leaves its gains: the weight, or 1 + weight in Gemma 3.
        even = torch.full((dim,), 1e3, dtype=module.q_norm.weight.dtype, device=size.device)
        pairs = [
            norm(even).double().abs().view(2, -1).amax(0) for norm in (module.q_norm, module.k_norm)
        ]
        ceiling = scale * scaling**2 * dim * (pairs[0] * pairs[1]).max()
        ceiling = ceiling.cpu().expand(len(weight))
    softcap = getattr(module, "attn_logit_softcapping", None)
    return LogitNorms(at, weight, query_bias, key_bias, biases, ceiling, softcap)


def _rotated(queries: Tensor, keys: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """tr(Q Rot K Rot^T) of Gram matrices Q [Hkv, ..., dim, dim] and K [Hkv, dim, dim] at the
    distances of the rotation (cos, sin [distances, dim]): [Hkv, ..., distances].
    """
    if not keys.any():  # no bias
        return queries.new_zeros(*queries.shape[:-2], len(rotation[0]))
    step = max(_CHUNK_BYTES // (8 * keys.numel()), 1)
    parts = []
    for cos, sin in zip(*(x.split(step) for x in rotation), strict=True):
        turned = keys[:, None]
        for _ in range(2):  # the columns, then the rows
            first, rest = turned.tensor_split([cos.shape[1]], -1)
            first = first * cos[:, None] + _half_turn(first) * sin[:, None]
            turned = torch.cat([first, rest.expand(*first.shape[:-1], -1)], -1).mT
        parts.append(queries.flatten(1, -3).flatten(2) @ turned.flatten(2).mT)
    return torch.cat(parts, -1).unflatten(1, queries.shape[1:-2])


def _half_turn(x: Tensor) -> Tensor:
    """As transformers pairs dimensions: each with the one half a head away."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
