"""How each kernel is launched, by head dimension and GPU: one small table, no autotuning.

Rows were found with the ahead-of-time compiler (`lit-sparse kernels` prints what it says of them):
no spills up to head_dim 128, matrix products on the widest tensor-core path, gathered loads
prefetched. `lit-sparse benchmark --tune` times the alternatives on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

from lit_sparse.attention.triton.run import architecture


@dataclass(frozen=True)
class Launch:
    """Args:
    rows: packed rows of a program (forward, dQ, masses), or of one step (dK/dV).
    step: keys of one step; for dK/dV the keys of a program; for masses the blocks of a step.
    warps: warps of a program.
    stages: depth of the software pipeline; below 3 nothing is prefetched.
    tma: gathered operands come by tensor descriptors (Hopper's TMA) rather than pointers.
    split: dK and dV in a launch each, where one program cannot hold both sums in registers.
    """

    rows: int
    step: int
    warps: int
    stages: int = 3
    tma: bool = False
    split: bool = False

    def warps_for(self, rows: int) -> int:
        """Warps of a program with fewer rows than the table's: 64 rows under 8 warps would be
        computed twice, by both warp groups.
        """
        return self.warps if rows == self.rows else min(self.warps, 4)


TABLE: dict[str, dict[str, dict[int, Launch]]] = {
    "sm_90": {
        "forward": {
            64: Launch(128, 64, 8, tma=True),
            128: Launch(128, 64, 8, tma=True),
            256: Launch(128, 32, 8),
        },
        "dq": {
            64: Launch(128, 64, 8, tma=True),
            128: Launch(128, 64, 8, tma=True),
            256: Launch(128, 32, 8),
        },
        "dkdv": {
            64: Launch(64, 64, 4, tma=True),
            128: Launch(32, 64, 4, tma=True),
            256: Launch(32, 64, 4, tma=True, split=True),
        },
        "masses": {
            64: Launch(128, 64, 8),
            128: Launch(128, 64, 8),
            256: Launch(128, 64, 8),
        },
    },
    "sm_80": {
        "forward": {
            64: Launch(128, 64, 8),
            128: Launch(128, 32, 8),
            256: Launch(64, 16, 4),
        },
        "dq": {
            64: Launch(128, 64, 8),
            128: Launch(128, 32, 8),
            256: Launch(64, 16, 4),
        },
        "dkdv": {
            64: Launch(32, 64, 4),
            128: Launch(64, 64, 8),
            256: Launch(32, 64, 4, split=True),
        },
        "masses": {
            64: Launch(128, 64, 8),
            128: Launch(128, 64, 8),
            256: Launch(128, 64, 8),
        },
    },
}


# What fits the 99 KiB of shared memory that desktop and inference GPUs have.
TABLE["sm_86"] = {
    **TABLE["sm_80"],
    "dkdv": {
        64: Launch(32, 64, 4),
        128: Launch(32, 64, 8),
        256: Launch(16, 64, 8, split=True),
    },
    "masses": {**TABLE["sm_80"]["masses"], 256: Launch(64, 32, 4)},
}


def launch(kernel: str, device: torch.device, dim: int) -> Launch:
    """The row of the table for a kernel, a device and a head dimension."""
    return TABLE[architecture(device)][kernel][max(padded_dim(dim), 64)]


@contextmanager
def replaced(kernel: str, device: torch.device, dim: int, row: Launch) -> Iterator[None]:
    """Inside, another row stands in the table (to compare launches)."""
    column = TABLE[architecture(device)][kernel]
    key = max(padded_dim(dim), 64)
    before, column[key] = column[key], row
    try:
        yield
    finally:
        column[key] = before


def padded_dim(dim: int) -> int:
    """The head dimension as kernels hold it in registers: a power of two, 16 at least."""
    return max(triton.next_power_of_2(dim), 16)


@dataclass(frozen=True)
class Rows:
    """How the rows of a tile are packed: token by token, the query heads of a group side by side.

    Args:
        groups: query heads per key-value head, G.
        padded_groups: the same, rounded up to a power of two.
        tile: queries of a tile.
    """

    groups: int
    padded_groups: int
    tile: int

    @classmethod
    def of(cls, groups: int, tile: int) -> Rows:
        return cls(groups, triton.next_power_of_2(groups), tile)

    def count(self, most: int) -> int:
        """Rows of a program: the whole tile if it has at most `most`; 16 is a matrix product's
        least.
        """
        return max(min(self.tile * self.padded_groups, most), self.padded_groups, 16)

    def chunks(self, rows: int) -> int:
        """Programs of `rows` rows that a tile takes."""
        return -(-self.tile // (rows // self.padded_groups))
