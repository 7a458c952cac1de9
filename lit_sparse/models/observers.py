"""Watch the attention of a sparsified model from outside."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lit_sparse.models.state import ModelState, Observer, require_state
from lit_sparse.models.support import attention_layers


class Observation:
    """Handle of an observer: a context manager that ends the observation, or `remove()` does."""

    def __init__(self, state: ModelState, entry: tuple[Observer, frozenset[int] | None]) -> None:
        self._state = state
        self._entry = entry
        state.observers.append(entry)

    def remove(self) -> None:
        """Stop observing. A second call does nothing."""
        # By identity: the same function may observe twice.
        self._state.observers = [e for e in self._state.observers if e is not self._entry]

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def observe(model: nn.Module, fn: Observer, layers: Iterable[int] | None = None) -> Observation:
    """Have a function called after each sparse attention call, with what went in and came out.

    The call is `fn(layer, q, k, v, out, lse, selection, options, documents)`. The tensors are
    packed and detached: q, out [T, Hq, D], k, v [Tk, Hkv, D], lse [T, Hq]; `options` are those of
    the softmax (`lit_sparse.attention.options.Options`: scale, window, softcap, sinks), `documents`
    says which tokens belong together. When activation checkpointing computes a layer again, nobody
    is called. Any number of observers may watch a model, and end in any order. A compiled model
    calls them too, without a new graph; it may use the tensors' memory again afterwards, so clone
    what you keep (the selection is yours).

    Args:
        model: a sparsified model.
        fn: the observer; what it raises ends the forward.
        layers: layer numbers to watch, such as `law_layers(model)`; None for all.

    Raises:
        ValueError: the model is not sparsified, or has no such layer.
    """
    state = require_state(model)
    watched = None if layers is None else frozenset(layers)
    numbers = {layer for layer, _ in attention_layers(model)}
    if watched is not None and watched - numbers:
        raise ValueError(
            f"layers names {sorted(watched - numbers)}, but the model has layers 0 to "
            f"{len(numbers) - 1}"
        )
    return Observation(state, (fn, watched))
