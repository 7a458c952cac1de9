"""The memory of a GPU: states, one row's forward and backward, the step, generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lit_sparse.attention.plan import Plan
from lit_sparse.recipes.estimate.kinds import Keeps
from lit_sparse.recipes.estimate.live import Bytes
from lit_sparse.recipes.estimate.model import Model
from lit_sparse.recipes.estimate.sharding import Sharding, States
from lit_sparse.recipes.estimate.step import Recipe, decoder_bytes, loss_bytes, prefill_bytes

PARTS = ("activations", "attention", "selection")
"""What the bytes of a row are for. activations: what layers keep and compute with. attention: what
the operator saves and works with. selection: the lists of kept blocks, and making them."""


@dataclass(frozen=True)
class Row:
    """Forward and backward of one row, or of a rank's part of it.

    Args:
        backward: bytes by `PARTS` at the largest moment of a layer's backward.
        kept: bytes that all layers keep for it.
        logits: bytes of the head and the loss, when these are there and no more.
        cpu: bytes of layer inputs that wait in CPU memory.
    """

    backward: Bytes
    kept: int
    logits: int
    cpu: int = 0

    @property
    def peak(self) -> int:
        return max(self.backward.total(), self.kept + self.logits)


def row_memory(
    model: Model,
    recipe: Recipe,
    activations: str,
    kinds: Mapping[Keeps, int],
    plan: Callable[[Keeps], Plan],
    sequence: int,
) -> Row:
    """Of one curriculum stage.

    Args:
        activations: "keep", "recompute" or "offload"; the last two go with `recipe.recompute`.
        kinds: what layers keep -> how many do.
        plan: of a row under that.
        sequence: ranks that share the row.
    """
    decoders = {keeps: decoder_bytes(model, recipe, plan(keeps), sequence) for keeps in kinds}
    kept = Counter(next(iter(decoders.values())).once)
    for keeps, layers in kinds.items():
        kept.update({name: layers * n for name, n in decoders[keeps].layer.items()})
    tokens = plan(next(iter(kinds))).queries[-1] // sequence
    cpu = 0
    if activations == "offload":
        # All but the input of the layer that is being worked on.
        own = tokens * model.hidden * recipe.dtype.itemsize
        kept["activations"] -= own * (model.layers - 1)
        cpu = own * model.layers
    work = max((decoder.work for decoder in decoders.values()), key=Counter.total)
    backward = Counter({name: kept[name] + work[name] for name in PARTS})
    return Row(backward, kept.total(), loss_bytes(model, recipe, tokens), cpu)


def cache_bytes(model: Model, itemsize: int, length: int) -> int:
    """Keys and values of a generation at `length` tokens."""
    return 2 * model.layers * model.kv_heads * model.head_dim * length * itemsize


@dataclass(frozen=True)
class Memory:
    """One GPU under a sharding.

    Args:
        rows: of each curriculum stage.
        cache: key-value cache of a generation at the longest length.
        prefill: what that generation's first forward needs besides; None where nothing generates.
    """

    sharding: Sharding
    states: States
    rows: tuple[Row, ...]
    cache: int
    prefill: int | None

    @property
    def row(self) -> Row:
        """The largest of the rows."""
        return max(self.rows, key=lambda row: row.peak)

    @property
    def moments(self) -> dict[str, dict[str, float]]:
        """What is there, besides the states, when a row is trained, when the loss is made, in an
        optimizer step and in a generation: bytes by what they are for.
        """
        buffers, row = self.states.buffers, self.row
        moments = {
            "training": {"buffers": buffers, **row.backward},
            "loss": {"buffers": buffers, "activations": row.kept, "logits": row.logits},
            "step": {"step": self.states.step},
        }
        if self.prefill is not None:
            moments["generation"] = {"buffers": buffers, "cache": self.cache}
            moments["generation"]["activations"] = self.prefill
        return moments

    @property
    def moment(self) -> str:
        """The one that needs most."""
        moments = self.moments
        return max(moments, key=lambda name: sum(moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes at that moment by what they are for."""
        states = self.states
        return {
            "weights": states.weights,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
            **self.moments[self.moment],
        }

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    def cpu(self, per_node: int) -> float:
        """Bytes of CPU memory of a node with at most so many GPUs."""
        return min(self.sharding.gpus, per_node) * (self.states.cpu + self.row.cpu)


def prefill_memory(model: Model, recipe: Recipe, plan: Plan) -> int:
    """Beside the cache: the largest moment of a forward of one document, and the copy of a layer's
    cache that a decoding step makes.
    """
    copied = cache_bytes(model, recipe.dtype.itemsize, plan.queries[-1]) // model.layers
    return max(prefill_bytes(model, recipe, plan), copied)
