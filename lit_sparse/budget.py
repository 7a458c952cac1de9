"""The law k(n) = alpha * n^C: how many keys a query that sees n tokens may attend to.

Source: "How Sparse Attention Approximates Exact Attention? Your Attention is Naturally n^C-Sparse"
(arXiv 2404.02690), whose adaptive window size is alpha * n^C.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

# alpha * n**C computed in float64 lies a few units in the last place off the true value. Where the
# true value is an integer (64 * 32768^(1/3) = 2048) a bare ceil would then depend on the libm that
# computed it.
_ROUNDING = 1e-12

LONGEST = 2**62
"""The context at which `longest_context` stops looking, in tokens."""

PRESETS: dict[str, dict[str, float]] = {
    "eco": {"alpha": 64.0, "exponent": 1 / 3, "floor": 1024},
    "balanced": {"alpha": 16.0, "exponent": 0.5, "floor": 1024},
    "safe": {"alpha": 4.0, "exponent": 2 / 3, "floor": 1024},
    "near-lossless": {"alpha": 0.86, "exponent": 0.85, "floor": 1024},
}


@dataclass(frozen=True)
class Budget:
    """Keys that a query may attend to, as a function of the `n` tokens it sees (itself included).

    `budget(n) = min(n, clip(ceil(alpha * n**exponent), floor, ceiling))`, computed in float64; `n`
    itself up to `dense_below`.

    Args:
        alpha: factor of the law, in keys; positive.
        exponent: C of the law, in [0, 1]; 0 is a fixed window, 1 a fixed share of the context.
        floor: fewest keys, whatever the law says (a context shorter than that is dense).
        ceiling: most keys, or None for no limit.
        sink: tokens at the start of a document whose blocks are always kept.
        local: share of the budget spent on the nearest keys, in [0, 1]; 1 is a sliding window.
        late: share of the remaining blocks that the queries of a tile choose themselves, each from
            its own row on, in [0, 1]; the others are chosen by the recent past.
        law: "power" for alpha * n**exponent, "log" for alpha * ln(n) (for comparison; see
            `Budget.log`).
        dense_below: contexts of at most so many tokens keep every key. Documents that stay under it
            run PyTorch's dense kernel: set it to the length from which `lit-sparse benchmark` finds
            sparse attention the faster one on your GPU.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    alpha: float = 16.0
    exponent: float = 0.5
    floor: int = 1024
    ceiling: int | None = None
    sink: int = 64
    local: float = 0.5
    late: float = 0.1
    law: Literal["power", "log"] = "power"
    dense_below: int = 0

    def __post_init__(self) -> None:
        def require(holds: bool, key: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"budget.{key} must be {rule}, got {getattr(self, key)!r}")

        require(math.isfinite(self.alpha) and self.alpha > 0, "alpha", "a positive number")
        require(0 <= self.exponent <= 1, "exponent", "in [0, 1]")
        require(_is_count(self.floor) and self.floor >= 0, "floor", "a whole number >= 0")
        if self.ceiling is not None:
            least = max(1, self.floor)
            rule = f"None or a whole number >= {least} (the floor)"
            require(_is_count(self.ceiling) and self.ceiling >= least, "ceiling", rule)
        require(_is_count(self.sink) and self.sink >= 0, "sink", "a whole number >= 0")
        require(0 <= self.local <= 1, "local", "in [0, 1]")
        require(0 <= self.late <= 1, "late", "in [0, 1]")
        whole = _is_count(self.dense_below) and self.dense_below >= 0
        require(whole, "dense_below", "a whole number >= 0")
        require(self.law in ("power", "log"), "law", "'power' or 'log'")

    @overload
    def __call__(self, n: int) -> int: ...
    @overload
    def __call__(self, n: Tensor) -> Tensor: ...
    def __call__(self, n: int | Tensor) -> int | Tensor:
        """Keys for a context of `n` tokens: an int for an int, an int64 tensor for a tensor."""
        if isinstance(n, Tensor):
            return self._keys(n)
        return int(self._keys(torch.tensor(n, dtype=torch.int64)))

    def _keys(self, n: Tensor) -> Tensor:
        n = n.to(torch.int64)
        context = n.clamp(min=1).to(torch.float64)
        if self.law == "power":
            raw = self.alpha * context**self.exponent
        else:
            raw = self.alpha * context.log()
        # Clamped before the cast: a float64 past 2^63 has no integer.
        keys = (raw - raw * _ROUNDING).clamp(max=float(LONGEST)).ceil().to(torch.int64)
        keys = keys.clamp(min=self.floor, max=self.ceiling)
        return torch.where(n <= self.dense_below, n, torch.minimum(n, keys))

    def longest_context(self, keys: int) -> int:
        """The inverse of the law: the longest context whose budget is at most `keys`.

        Returns `LONGEST` if no context asks for more (a ceiling or a fixed window at or below
        `keys`).
        """
        if keys < 0:
            raise ValueError(f"keys must be >= 0, got {keys}")
        if self.dense_below:
            # Beyond it the law alone counts; below, a context is its own budget.
            beyond = replace(self, dense_below=0).longest_context(keys)
            return beyond if beyond > self.dense_below else min(keys, self.dense_below)
        low, high = 0, 1
        while high < LONGEST and self(high) <= keys:
            low, high = high, min(high * 2, LONGEST)
        if high == LONGEST and self(high) <= keys:
            return LONGEST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(middle) <= keys else (low, middle)
        return low

    def scaled(self, factor: float) -> Budget:
        """The same law with alpha times a positive factor; one that keeps every key stays so."""
        dense = self.law == "power" and self.exponent == 1 and self.alpha >= 1
        return self if dense or factor == 1 else replace(self, alpha=self.alpha * factor)

    def to_dict(self) -> dict[str, Any]:
        """The arguments that build this budget again: `Budget(**budget.to_dict()) == budget`."""
        return asdict(self)

    def __str__(self) -> str:
        form = (
            f"{self.alpha:g} ln n" if self.law == "log" else f"{self.alpha:g} n^{self.exponent:g}"
        )
        ceiling = "" if self.ceiling is None else f", ceiling {self.ceiling}"
        dense = f", dense to {self.dense_below}" if self.dense_below else ""
        return f"k(n) = {form}, floor {self.floor}{ceiling}{dense}"

    @classmethod
    def through(cls, k_ref: float, n_ref: float, exponent: float, **others: Any) -> Budget:
        """The law of that exponent through one point: `k_ref` keys at `n_ref` tokens.

        Two laws that agree at a length in use are easier to compare than two values of alpha,
        which is strongly correlated with the exponent. `through(f * n, n, C)` keeps a share f of a
        context n.
        """
        if not k_ref > 0 or not n_ref > 0:
            raise ValueError(f"k_ref and n_ref must be positive, got {k_ref} and {n_ref}")
        return cls(alpha=k_ref / n_ref**exponent, exponent=exponent, **others)

    @classmethod
    def preset(cls, name: str, **others: Any) -> Budget:
        """A named law: "eco" 64 n^(1/3), "balanced" 16 n^.5, "safe" 4 n^(2/3), "near-lossless" .86
        n^.85.

        All have a floor of 1024 keys, which overrides the law at short contexts.
        """
        if name not in PRESETS:
            raise ValueError(f"no budget preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **others})

    @classmethod
    def fixed(cls, k: int, **others: Any) -> Budget:
        """The same `k` keys at any context: what most sparse attentions do."""
        return cls(**{"alpha": float(k), "exponent": 0.0, "floor": 0, **others})

    @classmethod
    def log(cls, a: float, **others: Any) -> Budget:
        """`a * ln(n)` keys: too few for a stable approximation (arXiv 2404.02690), kept to show
        it.
        """
        return cls(**{"alpha": a, "law": "log", "floor": 0, **others})

    @classmethod
    def dense(cls) -> Budget:
        """Every key: dense causal attention."""
        return cls(alpha=1.0, exponent=1.0, floor=0)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
