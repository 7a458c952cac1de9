"""When the numbers of collapse are an alert: limits, persistence and change, for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lit_sparse.callbacks.alerts import Persistence, Place, places_of
from lit_sparse.callbacks.long_rows import LongRows
from lit_sparse.callbacks.sampler import Sample

MOVED = 0.1
"""Least change against the first measurement: of ratios in [0, 1], as a share of a limit of logits,
and of ranges in nats."""

_WHOLE = (None,)


@dataclass(frozen=True)
class CollapseLimits:
    """Past what `CollapseMonitor` alerts.

    Args:
        concentration: least entropy over ln n of a head, the sink left out.
        gamma: largest mean gamma of a layer's heads, the smaller of that by sigma and that by
            entropy; 1 is collapsed.
        dispersion: largest entropy over ln n of a head.
        saturated_rows: largest share of a layer's rows with a weight above 0.95 outside the sink.
        jacobian_trace: least 1 - sum p^2 of a layer, the sink left out.
        rank_residual: least ||X - mean|| / ||X|| of a head's outputs.
        large_logit, exploding_logit: largest absolute logits of a head.
        missed_mass: mass that a layer's budget may miss, for the logit range that it needs.
    """

    concentration: float = 0.05
    gamma: float = 0.9
    dispersion: float = 0.95
    saturated_rows: float = 0.2
    jacobian_trace: float = 0.05
    rank_residual: float = 0.05
    large_logit: float = 50.0
    exploding_logit: float = 100.0
    missed_mass: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), 1.0
            if field.name in ("gamma", "large_logit", "exploding_logit"):
                most = float("inf")
            if not 0 < value < most:
                raise ValueError(
                    f"CollapseMonitor limits.{field.name} must be above 0"
                    f"{' and below 1' if most == 1 else ''}, got {value}"
                )


@dataclass(frozen=True)
class Finding:
    """What an `Alarm` is raised with."""

    kind: str
    places: list[Place]
    what: str


class CollapseRules:
    """Judges each measurement in the light of those before it.

    Args:
        limits: see `CollapseLimits`.
        patience: measurements on end that must be past a limit.
    """

    def __init__(self, limits: CollapseLimits, patience: int) -> None:
        self.limits = limits
        self._persistence = Persistence(patience)
        self._concentrated = LongRows(limits.concentration, patience)
        self._dispersed = LongRows(1 - limits.dispersion, patience)
        self._margin: dict[int, Tensor] = {}

    def judge(
        self, sample: Sample, rows: dict[str, Tensor], heads: dict[str, Tensor]
    ) -> list[Finding]:
        """What is wrong by now; a place is named again as long as it is past its limit.

        Args:
            sample: of this measurement.
            rows, heads: its `row_metrics` and `head_metrics`.
        """
        found = [
            *self._sharpness(sample, heads),
            *self._layers(sample, heads),
            *self._long_rows(sample, rows),
        ]
        return [finding for finding in found if finding.places]

    def _hold(
        self,
        sample: Sample,
        kind: str,
        values: Tensor,
        past: Tensor,
        moved: float | None,
        what: str,
        heads: Sequence[int | None] | None = None,
    ) -> Finding:
        """Of values and past [layers, H]; of whole layers where `heads` is (None,)."""
        layers = list(sample.layers)
        flags = torch.stack(
            [
                self._persistence.add(f"{kind} {layer}", value, beyond, moved)
                for layer, value, beyond in zip(layers, values, past, strict=True)
            ]
        )
        return Finding(kind, places_of(flags, values, layers, heads or sample.heads), what)

    def _sharpness(self, sample: Sample, heads: dict[str, Tensor]) -> list[Finding]:
        limits = self.limits
        sharp, even = heads["entropy_ratio_without_sink"], heads["entropy_ratio"]
        residual, logit = heads["rank_residual"], heads["logit_max"]
        alike = residual < limits.rank_residual
        # A head parked on the sink gives all tokens the sink's value, and that is healthy; not so
        # if the whole layer does.
        alike &= (heads["sink_mass"] < 0.5) | (alike | residual.isnan()).all(1, keepdim=True)
        found = [
            self._hold(
                sample,
                "concentration",
                sharp,
                sharp < limits.concentration,
                -MOVED,
                f"entropy over ln n, the sink left out, below {limits.concentration}"
                + _gammas(heads, sharp < limits.concentration),
            ),
            self._hold(
                sample,
                "dispersion",
                even,
                even > limits.dispersion,
                MOVED,
                f"entropy over ln n above {limits.dispersion}",
            ),
            self._hold(
                sample,
                "rank_loss",
                residual,
                alike,
                -MOVED,
                f"||X - mean|| / ||X|| of the outputs below {limits.rank_residual}",
            ),
        ]
        for kind, limit in (
            ("large_logits", limits.large_logit),
            ("exploding_logits", limits.exploding_logit),
        ):
            what = f"largest absolute logit above {limit:g}"
            found.append(self._hold(sample, kind, logit, logit > limit, MOVED * limit, what))
        return found

    def _layers(self, sample: Sample, heads: dict[str, Tensor]) -> list[Finding]:
        limits = self.limits
        # By layer: single heads are that sharp in good health (a previous-token head).
        both = torch.minimum(heads["gamma"], heads["gamma_of_entropy"]).nanmean(1, keepdim=True)
        share = heads["saturated"].nanmean(1, keepdim=True)
        trace = heads["jacobian_trace_without_sink"].nanmean(1, keepdim=True)
        saturated = (share > limits.saturated_rows) | (trace < limits.jacobian_trace)
        # The best head: it says what the layer's norms and caps allow.
        margin = heads["range_margin"]
        best = margin.nan_to_num(-torch.inf).amax(1, keepdim=True)
        margin = torch.where(margin.isnan().all(1, keepdim=True), torch.nan, best)
        # A young model's range still rises.
        settled = torch.stack(
            [
                value <= self._margin.get(layer, value) + MOVED
                for layer, value in zip(sample.layers, margin, strict=True)
            ]
        )
        self._margin.update(zip(sample.layers, margin, strict=True))
        return [
            self._hold(
                sample,
                "saturation",
                share,
                saturated,
                MOVED,
                f"share of rows with a weight above 0.95 outside the sink, past "
                f"{limits.saturated_rows}, or 1 - sum p^2 below {limits.jacobian_trace}",
                _WHOLE,
            ),
            self._hold(
                sample,
                "near_collapse",
                both,
                both >= limits.gamma,
                MOVED,
                f"mean gamma of the heads, by sigma and by entropy, {limits.gamma} or above (1 is "
                "collapsed)",
                _WHOLE,
            ),
            self._hold(
                sample,
                "infeasible_range",
                margin,
                (margin < 0) & settled,
                None,
                "nats that the logit range of the layer's best head is from what k(n) keys need "
                f"to miss no more than {limits.missed_mass:g} of the mass",
                _WHOLE,
            ),
        ]

    def _long_rows(self, sample: Sample, rows: dict[str, Tensor]) -> list[Finding]:
        found = []
        for rule, distance, failure in (
            (self._concentrated, rows["entropy_ratio_without_sink"], "concentration"),
            (self._dispersed, 1 - rows["entropy_ratio"], "dispersion"),
        ):
            places = []
            for (layer, statistics), near in zip(sample.layers.items(), distance, strict=True):
                context = statistics.context
                flags, value = rule.add(layer, context, near[: len(context)])
                ratio = value if rule is self._concentrated else 1 - value
                places += places_of(flags[None], ratio[None], [layer], sample.heads)
            what = (
                f"{failure} of the longest rows (entropy over ln n) that shorter rows of these "
                "heads do not have, or that began with longer contexts"
            )
            found.append(Finding("long_context_collapse", places, what))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "persistence": self._persistence.state_dict(),
            "concentrated": self._concentrated.state_dict(),
            "dispersed": self._dispersed.state_dict(),
            "margin": self._margin,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._persistence.load_state_dict(state_dict["persistence"])
        self._concentrated.load_state_dict(state_dict["concentrated"])
        self._dispersed.load_state_dict(state_dict["dispersed"])
        self._margin = dict(state_dict["margin"])


def _gammas(heads: dict[str, Tensor], past: Tensor) -> str:
    """Which of the two gammas to trust, where they disagree in a head that is past its limit."""
    sigma, entropy = heads["gamma"][past], heads["gamma_of_entropy"][past]
    if not len(sigma) or (sigma - entropy).abs().max() < 2 * MOVED:
        return ""
    return (
        f"; gamma is {sigma.mean():.2f} by sigma and {entropy.mean():.2f} by entropy: these logits "
        "are not Gaussian, trust the entropy"
    )
