"""FLOPs of a curriculum stage from the work that is executed, and the days they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lit_sparse.attention.plan import Plan
from lit_sparse.recipes.benchmark.cost import BACKWARD, FORWARD
from lit_sparse.recipes.estimate.gpus import Gpu
from lit_sparse.recipes.estimate.kinds import Keeps
from lit_sparse.recipes.estimate.model import Model
from lit_sparse.recipes.estimate.step import Recipe


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage, and how much of the causal pairs is executed.

    Args:
        products: of the model's matrices with tokens.
        attention: of the executed pairs.
        selection: scores of tiles and blocks.
        dense_attention: of all pairs that the model as it comes has, instead of both.
        executed: executed pairs / causal pairs, mean of the layers that obey a law.
    """

    products: float
    attention: float
    selection: float
    dense_attention: float
    executed: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.selection

    @property
    def dense(self) -> float:
        """With dense attention."""
        return self.products + self.dense_attention

    def days(self, gpu: Gpu, gpus: int, utilisation: float) -> float:
        return self.total / (gpus * gpu.tflops * 1e12 * utilisation) / 86400


def work(
    model: Model,
    recipe: Recipe,
    kinds: Mapping[Keeps, int],
    plan: Callable[[Keeps], Plan],
    rows: int,
) -> Work:
    """Of `rows` rows.

    A parameter of a matrix costs 2 FLOPs a token in the forward and 4 in the backward (2 where it
    is frozen, of which none are spared below the first layer that is trained), and 2 more
    wherever the forward runs again: with activation checkpointing, in a tiled MLP, and in the
    chunked or tiled loss. A pair of attention costs `FORWARD` and `BACKWARD` FLOPs a head
    dimension; a scored row and block 2. Norms, activations, softmax and the optimizer are not
    counted.
    """
    per_token = (4 + 2 * recipe.recompute) * model.matrices + 2 * model.trained_matrices
    if recipe.tiled_mlp is not None:
        per_token += 2 * model.mlp
    elif recipe.recompute:
        # PyTorch stops where the last saved tensor is there: before the MLP's third product.
        per_token -= 2 * model.mlp // 3
    per_token += (4 + 2 * model.trains_head) * model.head
    per_token += 2 * model.head * (recipe.loss != "liger")
    forwards = 1 + recipe.recompute
    pairs = FORWARD * forwards + BACKWARD
    dimensions = model.heads * model.head_dim
    executed = scored = whole = obeying = causal = tokens = 0
    for keeps, layers in kinds.items():
        one = plan(keeps)
        executed += layers * executed_pairs(one)
        scored += layers * scored_pairs(one)
        whole += layers * causal_pairs(one, keeps.window)
        if keeps.window is None:
            obeying += layers * executed_pairs(one)
            causal += layers * causal_pairs(one)
        tokens = one.queries[-1]
    return Work(
        products=rows * float(per_token) * tokens,
        attention=rows * float(pairs * dimensions) * executed,
        selection=rows * float(2 * forwards * dimensions) * scored,
        dense_attention=rows * float(pairs * dimensions) * whole,
        executed=obeying / causal if causal else 1.0,
    )


def causal_pairs(plan: Plan, window: int | None = None) -> int:
    """(query, key) pairs of a head in dense attention, or in a sliding window."""
    lengths = np.diff(plan.queries)
    beyond = np.maximum(lengths - (window or lengths), 0)
    return int((lengths * (lengths + 1) // 2 - beyond * (beyond + 1) // 2).sum())


def executed_pairs(plan: Plan) -> int:
    """Pairs that the kernels compute: every listed block whole, in every row of its tile."""
    if plan.keeps_everything:
        return causal_pairs(plan)
    return int(plan.offsets[-1]) * plan.block * plan.tile


def scored_pairs(plan: Plan) -> int:
    """(query, block) pairs that the selection scores: of tiles that drop something, and of those
    before them. None where lengths alone decide.
    """
    if not plan.chooses:
        return 0
    before = np.append(plan.sparse[1:] & (plan.document[1:] == plan.document[:-1]), False)
    return int(plan.complete[plan.sparse | before].sum()) * plan.tile
