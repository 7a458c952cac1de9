"""How many cores other processes kept busy during a measurement.

Taking turns does not cancel such load. With several threads the sparse backend, which synchronises
them far more often than the dense kernel, was seen to lose several times as much to it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

NOTICEABLE = 0.15
"""Cores; below is what an idle system does."""


class OtherLoad:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._begin = _now()

    def cores(self) -> float | None:
        """Cores' worth of time that others used so far; None where the system does not say."""
        before, now = self._begin, _now()
        if before is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(before, now, strict=True))
        return max(busy - own, 0.0) / wall if wall > 0 else None


def _now() -> tuple[float, float, float] | None:
    """Seconds of wall clock, of all cores' work, and of the work of this process."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, interrupts, soft, stolen = (int(field) for field in fields[:8])
    busy = (user + nice + system + interrupts + soft + stolen) / ticks
    own = os.times()
    return time.perf_counter(), busy, own.user + own.system
