"""The one place where kernels are started, so that launches can be recorded instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """A launch: the kernel, its grid, positional arguments, keywords (constants and options)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recording: list[Call] | None = None
_target: str | None = None


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a kernel, unless its grid is empty."""
    if _recording is not None:
        _recording.append(Call(kernel, grid, args, options))
    elif all(grid):
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(_first_tensor(args)):
            kernel[grid](*args, **options)


def _first_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    return next(x for x in args if isinstance(x, torch.Tensor))


def architecture(device: torch.device) -> str:
    """The GPU generation whose launch table a device takes; the interpreter takes Hopper's."""
    if _target is not None:
        return _target
    if device.type == "cpu":
        return "sm_90"
    return _architecture(device)


@lru_cache
def _architecture(device: torch.device) -> str:
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks a field
    if properties.major == 9:
        return "sm_90"
    # Other generations run Ampere's rows: they are the ones without Hopper's instructions. Some of
    # each (8.6, 8.9, 12.0) have 99 KiB of shared memory for a program, not 163.
    large = properties.shared_memory_per_block_optin >= 160 * 1024
    return "sm_80" if large else "sm_86"


@contextmanager
def recorded(target: str) -> Iterator[list[Call]]:
    """Inside, kernels are not started but listed, as they would run on `target` ("sm_90")."""
    global _recording, _target
    before = _recording, _target
    _recording, _target = [], target
    try:
        yield _recording
    finally:
        _recording, _target = before
