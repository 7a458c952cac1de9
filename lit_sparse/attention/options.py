"""What turns products of queries and keys into logits, beside the selection."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of the softmax that a backend must honour or refuse.

    Args:
        scale: factor of q . k.
        window: how many of the nearest keys a row sees, its own included, within the blocks that
            its tile keeps (the `sliding_window` of transformers); None: all of them.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale!r}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window must be None or a positive number of keys, got {self.window}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be None or positive, got {self.softcap!r}")

    @property
    def plain(self) -> bool:
        """Whether the logits are scaled products and nothing else."""
        return self.window is None and self.softcap is None
