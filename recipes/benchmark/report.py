"""What a benchmark prints and writes: an aligned table, the machine it ran on, JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WIDTH = 120


class BadArgument(ValueError):
    """What the user asked for cannot be done: one line, exit code 2."""


def render_table(
    groups: Sequence[tuple[str, Sequence[str]]], rows: Sequence[Sequence[str]]
) -> list[str]:
    """Lines of a table with two header lines: names of column groups, names of columns.

    Args:
        groups: (name of the group, names of its columns), left to right.
        rows: cells of all columns; the first column stands flush left, the others flush right.
    """
    names = [name for _, columns in groups for name in columns]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    parts, begin = [], 0
    for group, columns in groups:
        part = slice(begin, begin := begin + len(columns))
        room = sum(widths[part]) + len(columns) - 1
        widths[part.start] += max(len(group) - room, 0)
        parts.append((group, part, max(len(group), room)))

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return " | ".join(" ".join(padded[part]) for _, part, _ in parts).rstrip()

    head = " | ".join(group.center(span) for group, _, span in parts).rstrip()
    rule = "-+-".join("-" * span for *_, span in parts)
    return [head, line(names), rule, *map(line, rows)]


def number(value: float | None, digits: int = 1) -> str:
    """A cell: "-" for nothing."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """A cell of three digits or more, whatever the size."""
    return number(value, 0 if value is not None and value >= 100 else 1)


def environment(command: str) -> dict[str, Any]:
    """Where and how a benchmark ran."""
    return {
        "command": command,
        "device": "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe(machine: dict[str, Any]) -> str:
    if "gpu" in machine:
        return (
            f"{machine['gpu']} ({machine['gpu_memory_mib']} MiB), driver {machine['driver']}, CUDA "
            f"{machine['cuda']}, cuDNN {machine['cudnn']}, triton {machine['triton']}, torch "
            f"{machine['torch']}, {machine['command']}"
        )
    return (
        f"{machine['device']}: {machine['cpu']}, {machine['threads']} threads on "
        f"{machine['cores']} cores, torch {machine['torch']}, {machine['command']}"
    )


def wrap(text: str) -> list[str]:
    """Lines of at most `WIDTH` columns, where a word is not longer."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def tokens(n: int) -> str:
    """4096 -> 4k, 1048576 -> 1M; what is no multiple of 1024 as it is."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


def named_layers(layers: Sequence[int]) -> str:
    """For example "layers 0-2, 5"; ascending numbers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(parts)}"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Not-a-number becomes null: JSON has no other word for it."""
    path.write_text(json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
