"""Alerts: what a monitor says when something goes wrong, once, where it happened and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lit_sparse.callbacks.common import add_text

ADVICE = {
    "concentration": "lower the learning rate of the query and key projections, use QK-norm, "
    "QK-clip or sigma-reparametrisation",
    "near_collapse": "the next step is concentration: lower the learning rate of the query and key "
    "projections, or clip them (QK-clip)",
    "saturation": "the softmax passes almost no gradient: lower the learning rate of the query "
    "and key projections, use QK-norm or QK-clip",
    "dispersion": "scale queries with ln n, allow a larger logit range, or raise the budget's "
    "alpha",
    "rank_loss": "all tokens get nearly the same output: check residual scale and value "
    "projections; if the head is dispersed too, cure that first",
    "large_logits": "lower the learning rate of the query and key projections; QK-clip acts at 100",
    "exploding_logits": "clip the query and key weights (QK-clip), or go back to a checkpoint and "
    "lower the learning rate",
    "long_context_collapse": "only the longest rows collapse: lengthen the context in smaller "
    "steps, use a RoPE rule for this length, or length-scaled softmax",
    "infeasible_range": "no choice of k(n) keys can hold the mass: raise alpha or the exponent, "
    "loosen QK-norm or the soft cap, or keep these layers dense (sparse_attention.layers)",
    "persistent_error": "a larger budget does not help here: keep these layers dense "
    "(sparse_attention.layers), or let lit-sparse calibrate look at their need",
    "gap_grows_with_length": "the law is too tight for long contexts: raise the exponent, or "
    "alpha; lit-sparse calibrate measures both",
    "not_finite": "go back to the last checkpoint with a lower learning rate or a longer warm-up; "
    "in half precision use bfloat16",
}
"""Kind of alert -> what to do, in a line; callbacks/README.md has the long form of each."""

_LISTED = 8


@dataclass(frozen=True)
class Place:
    """Where an alert happened, and the value that raised it. A head of None: the whole layer; a
    layer of None: the whole model.
    """

    layer: int | None
    head: int | None
    value: float

    def __str__(self) -> str:
        parts = [
            f"{k} {v}" for k, v in (("layer", self.layer), ("head", self.head)) if v is not None
        ]
        return f"{' '.join(parts) or 'model'}: {self.value:.3g}"


@dataclass(frozen=True)
class Alert:
    """One alert, of a kind in `ADVICE`, in all places that it was raised for at this step."""

    kind: str
    step: int
    places: tuple[Place, ...]
    what: str
    """What the values are, e.g. "entropy over ln n below 0.05"."""

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]

    def __str__(self) -> str:
        listed = "; ".join(map(str, self.places[:_LISTED]))
        more = f"; and {len(self.places) - _LISTED} more" if len(self.places) > _LISTED else ""
        return (
            f"{self.kind} at step {self.step}: {self.what} ({listed}{more}). {self.advice} "
            f"(callbacks/README.md, alerts/{self.kind})"
        )

    def to_markdown(self) -> str:
        """The same as a TensorBoard text: a table of all places."""
        rows = [f"| {p.layer} | {p.head} | {p.value:.4g} |" for p in self.places]
        return "\n".join(
            [
                f"**{self.kind.replace('_', ' ')}**, step {self.step}: {self.what}",
                "",
                "| layer | head | value |",
                "|---|---|---|",
                *(row.replace("None", "all") for row in rows),
                "",
                f"**What to do:** {self.advice}.",
            ]
        )


Reaction = Literal["warn", "stop"] | Callable[[Trainer, Alert], None]
"""What `on_alert` may be: a warning and a TensorBoard text only; the same, and training ends after
this step; the same, and a function called with trainer and alert, on every rank."""


class Alarm:
    """Raises each alert once in a place, and remembers across a resume where it did.

    Args:
        on_alert: see `Reaction`.
    """

    def __init__(self, on_alert: Reaction = "warn") -> None:
        if not (on_alert in ("warn", "stop") or callable(on_alert)):
            raise ValueError(f"on_alert must be 'warn', 'stop' or a callable, got {on_alert!r}")
        self.on_alert = on_alert
        self._raised: set[tuple[str, int | None, int | None]] = set()

    def raise_in(self, trainer: Trainer, kind: str, places: Sequence[Place], what: str) -> None:
        """Raise an alert in those places where it was not raised before."""
        new = tuple(p for p in places if (kind, p.layer, p.head) not in self._raised)
        if not new:
            return
        self._raised |= {(kind, p.layer, p.head) for p in new}
        alert = Alert(kind, trainer.global_step, new, what)
        rank_zero_warn(f"lit-sparse: {alert}")
        add_text(trainer, f"alerts/{kind}", alert.to_markdown())
        if self.on_alert == "stop":
            rank_zero_warn("lit-sparse: training ends after this step, as on_alert is stop")
            _stop_after_step(trainer)
        elif callable(self.on_alert):
            self.on_alert(trainer, alert)

    def state_dict(self) -> dict[str, Any]:
        return {"raised": [list(place) for place in sorted(self._raised, key=str)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._raised = {tuple(place) for place in state_dict["raised"]}


def _stop_after_step(trainer: Trainer) -> None:
    if trainer.fit_loop._should_accumulate():
        # should_stop would end in the middle of the step, and lose what it has accumulated.
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step + 1
    else:
        trainer.should_stop = True


class Persistence:
    """Which places stay past a limit, and moved there.

    Healthy heads are often extreme from the start: an alert wants `patience` measurements on end
    past its limit, and a change against the first one. After as many within the limit the last of
    them takes the place of the first if it is better: all heads of a new model disperse, and one
    that does so again later has changed. NaN is no measurement.

    Args:
        patience: measurements on end.
    """

    def __init__(self, patience: int = 4) -> None:
        if patience < 1:
            raise ValueError(f"patience must be >= 1, got {patience}")
        self.patience = patience
        self._first: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._well: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, past: Tensor, moved: float | None = 0.1) -> Tensor:
        """Add a measurement of a name; values of any one shape.

        Args:
            value: what is measured.
            past: bool, where it is past its limit now.
            moved: least change against the first measurement, negative for a fall; None: a value
                that was past its limit from the start counts too.

        Returns:
            bool, where the limit has been passed for `patience` measurements.
        """
        value = value.detach().double().cpu()
        known, past = ~value.isnan(), past.cpu()
        none = torch.zeros(value.shape, dtype=torch.int64)
        held, well = self._held.get(name, none), self._well.get(name, none)
        self._held[name] = held = torch.where(known, (held + 1) * past, held)
        self._well[name] = well = torch.where(known, (well + 1) * ~past, well)
        sign = math.copysign(1.0, moved or 1.0)
        first = self._first.get(name, value)
        better = (well == self.patience) & (sign * (first - value) > 0)
        self._first[name] = first = torch.where(first.isnan() | better, value, first)
        long = known & (held >= self.patience)
        return long if moved is None else long & (sign * (value - first) >= abs(moved))

    def held(self, name: str) -> Tensor:
        """int64: measurements on end that each place is past the limit by now."""
        return self._held[name]

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "held": self._held, "well": self._well}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first, self._held = dict(state_dict["first"]), dict(state_dict["held"])
        self._well = dict(state_dict["well"])


def places_of(
    flags: Tensor, values: Tensor, layers: Sequence[int], heads: Sequence[int | None]
) -> list[Place]:
    """The places where `flags` is set, bool [layers, heads], with their `values`."""
    return [
        Place(layers[i], heads[j], float(values[i, j])) for i, j in torch.nonzero(flags).tolist()
    ]
