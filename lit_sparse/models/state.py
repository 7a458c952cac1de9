"""What a sparsified model carries: its law, and on each attention module an object with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lit_sparse.attention.scores import get_scorer
from lit_sparse.attention.select import check_power_of_two
from lit_sparse.budget import Budget
from lit_sparse.models.documents import DocumentCache, in_backward

NAME = "lit_sparse"
"""Our name in transformers' registries, and of the attribute on attention modules."""

CONFIG_KEY = "sparse_attention"
"""The key of a model's config under which its law is saved."""


@dataclass(frozen=True)
class Law:
    """How a model's layers select keys: what a checkpoint remembers about sparse attention.

    Args:
        budget: the law of every layer without one of its own.
        layers: layer number -> its own budget (`Budget.dense()` keeps a layer dense).
        block: consecutive keys that are kept or dropped together, in tokens.
        tile: consecutive queries that share a selection, in tokens, or None for the operator's
            default.
        score: name of the block scorer.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    budget: Budget
    layers: Mapping[int, Budget] = field(default_factory=dict)
    block: int = 64
    tile: int | None = None
    score: str = "mass"

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise ValueError(f"budget must be a Budget, got {self.budget!r}")
        for layer, budget in self.layers.items():
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"layers maps layer numbers to budgets, got the key {layer!r}")
            if not isinstance(budget, Budget):
                raise ValueError(f"layers[{layer}] must be a Budget, got {budget!r}")
        check_power_of_two("block", self.block)
        if self.tile is not None:
            check_power_of_two("tile", self.tile)
        if not isinstance(self.score, str):
            raise ValueError(
                "score must be the name of a scorer, since the model's config stores it, got "
                f"{self.score!r}; for a scorer of your own call lit_sparse.attention.select"
            )
        get_scorer(self.score)
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))

    def of(self, layer: int) -> Budget:
        """The budget of one layer."""
        return self.layers.get(layer, self.budget)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON keeps unchanged: `Law.from_dict(law.to_dict()) == law`."""
        return {
            "budget": self.budget.to_dict(),
            "layers": {str(layer): budget.to_dict() for layer, budget in self.layers.items()},
            "block": self.block,
            "tile": self.tile,
            "score": self.score,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Law:
        """The law that `to_dict` stored; ValueError if this is none."""
        try:
            fields = dict(stored)
            budget = Budget(**fields.pop("budget"))
            layers = {int(key): Budget(**value) for key, value in fields.pop("layers", {}).items()}
            return cls(budget, layers, **fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"config.{CONFIG_KEY} holds no law that this version can read ({error}); pass a "
                "budget to sparsify"
            ) from error


Observer = Callable[..., None]


class ModelState:
    """What all layers of one sparsified model share.

    `dense`, `exchange` and `observers` are switches of the running process: no checkpoint keeps
    them, no copy of the model the latter two, and found documents refer to the original's tensors.
    """

    numbered: ClassVar[WeakValueDictionary[int, ModelState]] = WeakValueDictionary()
    """The states of this process by number: an operator of a compiled graph takes numbers only."""

    _count: ClassVar = itertools.count()

    def __init__(self, law: Law, backend: str | None = None) -> None:
        self.take(law)
        self.backend = backend
        self.dense = False
        self.exchange: Callable[..., Any] | None = None
        """Where ranks share a sequence: called instead of the attention function, with the same
        arguments, it calls that with whole sequences of fewer heads. `lit_sparse.distributed`.
        """
        self.observers: list[tuple[Observer, frozenset[int] | None]] = []
        self.documents = DocumentCache()
        self._enrol()

    def take(self, law: Law) -> None:
        """Obey a law as it was given to `sparsify`."""
        self.given = law
        self.budget: Budget | None = None
        """Instead of the given one, for a while: `set_budget`."""
        self.alpha_factor = 1.0
        """Of every budget: `scale_budget`."""
        self.law = law

    def change(self, budget: Budget | None, alpha_factor: float) -> None:
        """Obey the given law with another budget and every alpha times a factor."""
        self.budget, self.alpha_factor = budget, alpha_factor
        self.law = replace(
            self.given,
            budget=(budget or self.given.budget).scaled(alpha_factor),
            layers={i: own.scaled(alpha_factor) for i, own in self.given.layers.items()},
        )

    def _enrol(self) -> None:
        number = next(self._count)
        self.numbered[number] = self
        self.number = _constant(number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "exchange": None, "observers": [], "documents": DocumentCache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enrol()

    def notify(self, layer: int, tensors: tuple[Tensor, ...], *others: Any) -> None:
        """Call the observers of a layer, unless activation checkpointing computes it again."""
        if not self.observers or in_backward():
            return
        seen = [tensor.detach() for tensor in tensors]
        for observer, layers in list(self.observers):
            if layers is None or layer in layers:
                observer(layer, *seen, *others)


@dataclass
class LayerState:
    """Which layer an attention module is (number and name in the model), and its model's state."""

    layer: int
    name: str
    model: ModelState
    window: int | None = None
    """Keys of the layer's own sliding window: it keeps that and obeys no law."""

    def __post_init__(self) -> None:
        self.number = _constant(self.layer)
        self.read_model()

    def read_model(self) -> None:
        """Take over the model's law."""
        law = self.model.law
        dense = replace(law, budget=Budget.dense(), layers={})
        own = dense if self.window else replace(dense, budget=law.of(self.layer))
        self._sparse, self._dense = (json.dumps(x.to_dict()) for x in (own, dense))

    @property
    def law(self) -> str:
        """What the layer obeys at the moment, as a string: torch.compile compares it from call to
        call and compiles again where it changed; `read_law` makes it a Law.
        """
        return self._dense if self.model.dense else self._sparse


def _constant(number: int) -> Tensor:
    # A graph compiled for one layer serves the others if what tells them apart is a tensor.
    return torch.tensor(number, device="cpu")


@lru_cache(maxsize=1024)
def read_law(law: str) -> Law:
    """The law of one layer: `budget` is the layer's own."""
    return Law.from_dict(json.loads(law))


def layer_state(module: nn.Module) -> LayerState | None:
    """The state that `sparsify` put on an attention module, or None."""
    return getattr(module, NAME, None)


def is_sparse(model: nn.Module) -> bool:
    """Whether the model runs our attention at the moment; a law in its config alone is not that."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != NAME:
        return False
    return find_state(model) is not None


def find_state(model: nn.Module) -> ModelState | None:
    """The state that `sparsify` gave a model, or None."""
    for module in model.modules():
        state = layer_state(module)
        if isinstance(state, LayerState):
            return state.model
    return None


def require_state(model: nn.Module) -> ModelState:
    """The state of a model that runs our attention; ValueError where it does not."""
    state = find_state(model) if is_sparse(model) else None
    if state is None:
        raise ValueError(
            f"this {type(model).__name__} is not sparse: call sparsify(model, budget) first"
        )
    return state
