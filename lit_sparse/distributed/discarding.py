"""An optimizer step of DeepSpeed's engine that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_after_overflow(optimizer: Any) -> Iterator[None]:
    """Inside, a step of the engine's optimizer does what ZeRO does after an overflow, releasing the
    gradients, and leaves the loss scale alone.
    """

    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    replaced: Mapping[str, Any]
    if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # stage 3
        replaced = {"_overflow_check_and_loss_scale_update": overflow}
    elif hasattr(optimizer, "check_grad_overflow"):  # stages 1 and 2
        replaced = {"check_grad_overflow": True, "check_overflow": overflow}
    else:  # stage 0, which clears the gradients itself
        replaced = {"step": lambda *_, **__: None}
    if hasattr(optimizer, "_update_scale"):
        replaced = {**replaced, "_update_scale": lambda *_: None}
    before = {name: vars(optimizer)[name] for name in replaced if name in vars(optimizer)}
    for name, value in replaced.items():
        setattr(optimizer, name, value)
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)
        for name, value in before.items():
            setattr(optimizer, name, value)
