"""What turns products of queries and keys into logits, beside the selection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Options of the softmax that a backend must honour or refuse.

    Args:
        scale: factor of q . k.
        window: how many of the nearest keys a row sees, its own included, within the blocks that
            its tile keeps (the `sliding_window` of transformers); None: all of them.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
        sinks: [Hq], a learned logit of each head that takes its share of the softmax and gives no
            value (gpt-oss, arXiv 2508.10925). For those who look on: a backend gets it as an input
            of its own, which has a gradient.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale!r}")
        check_window(self.window)
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be None or positive, got {self.softcap!r}")

    def refuse_window(self) -> None:
        """ValueError where a window leaves nothing to compare with dense attention."""
        if self.window is not None:
            raise ValueError(
                f"a layer with a window of {self.window} keys is not measured against dense "
                "attention: it loses nothing against itself; observe law_layers(model) only"
            )

    def cap(self, products: Tensor) -> Tensor:
        """Logits of scaled products q . k, in place."""
        if self.softcap is None:
            return products
        return products.div_(self.softcap).tanh_().mul_(self.softcap)


def check_window(window: int | None) -> None:
    """ValueError unless this is None or a number of keys."""
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or a positive number of keys, got {window}")
