"""Counts the bytes of tensors by what they are for: of real ones, and of ones without memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Bytes = Counter[str]
"""What tensors are for -> their bytes."""


class LiveBytes(TorchDispatchMode):
    """Inside, every tensor that an operation allocates counts until it is freed.

    A storage counts once, however many views it has, and what was there before does not. What an
    operation allocates and frees by itself is not seen. Backwards on the CPU run in the thread that
    calls them, and so inside.
    """

    def __init__(self, label: str = "activations") -> None:
        super().__init__()
        self.label = label
        """What tensors are for that are allocated now; see `named`."""
        self.now: Bytes = Counter()
        self.peak: Bytes = Counter()
        """`now` at the moment when it was largest, since `forget_peak`."""

    @contextmanager
    def named(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def forget_peak(self) -> None:
        self.peak = Counter(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            # Otherwise it is a view, one of the arguments, or a shape without memory.
            if isinstance(x, Tensor) and _storage(x)._cdata not in known and not x.is_meta:
                known.add(_storage(x)._cdata)
                self._count(_storage(x))
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)
        return result

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self.now[self.label] += size
        weakref.finalize(storage, self._free, self.label, size).atexit = False

    def _free(self, label: str, size: int) -> None:
        self.now[label] -= size


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()
