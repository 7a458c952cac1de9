"""Arguments of the formulas: numbers or tensors, in float64, checked."""

from __future__ import annotations

import torch
from torch import Tensor

Value = float | Tensor
"""A number or a tensor; tensors broadcast against each other."""


def real(name: str, value: Value) -> Tensor:
    """float64; ValueError if an entry is NaN or infinite."""
    x = _as_tensor(value)
    _require(name, x, x.isfinite(), "finite")
    return x


def at_least(name: str, value: Value, least: float) -> Tensor:
    x = _as_tensor(value)
    _require(name, x, (x >= least) & x.isfinite(), f"finite and >= {least:g}")
    return x


def positive(name: str, value: Value) -> Tensor:
    x = _as_tensor(value)
    _require(name, x, (x > 0) & x.isfinite(), "finite and positive")
    return x


def between(name: str, value: Value, low: float, high: float) -> Tensor:
    """In [low, high]."""
    x = _as_tensor(value)
    _require(name, x, (x >= low) & (x <= high), f"in [{low:g}, {high:g}]")
    return x


def share(name: str, value: Value) -> Tensor:
    """Strictly between 0 and 1."""
    x = _as_tensor(value)
    _require(name, x, (x > 0) & (x < 1), "strictly between 0 and 1")
    return x


def _as_tensor(value: Value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _require(name: str, x: Tensor, holds: Tensor, rule: str) -> None:
    # NaN holds nowhere.
    if not holds.all():
        raise ValueError(f"{name} must be {rule}, got {x[~holds].flatten()[0].item():g}")
