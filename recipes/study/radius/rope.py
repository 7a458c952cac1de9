"""What RoPE does to R and to the logits: the same weights under several rotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_sparse.models import rope_parameters, set_rope
from lit_sparse.models.norms import distances, logit_norms
from lit_sparse.models.rope import replace_rope
from lit_sparse.recipes.study import subjects
from lit_sparse.recipes.study.findings import Settings
from lit_sparse.recipes.study.radius.measure import Radii, measure
from lit_sparse.recipes.study.subjects import Subject

OWN, NONE = "own", "none"
"""The rotation that the model was trained with; no rotation."""

_STRETCHED = 4
"""Contexts that YaRN is set for, in those of the model; also the longest that are measured."""

_LONGEST = 8192

# Positions so close together that float32 sees one: position interpolation in its limit.
_ONE_PLACE = {"rope_type": "linear", "factor": 1e12}

RULES: dict[str, Mapping[str, Any]] = {
    OWN: {},
    NONE: _ONE_PLACE,
    "theta 1e4": {"rope_type": "default", "rope_theta": 1e4},
    "theta 5e5": {"rope_type": "default", "rope_theta": 5e5},
    "theta 1e7": {"rope_type": "default", "rope_theta": 1e7},
    f"YaRN x{_STRETCHED}": {"rope_type": "yarn", "factor": float(_STRETCHED)},
}
"""Name -> what `set_rope` is given."""


@dataclass(frozen=True)
class Rotated:
    """One model under one rule."""

    rule: str
    subject: Subject
    distances: Tensor
    """int64 [distances], up to the longest measured text."""
    weight: Tensor
    """||W||_F at these distances, float64 [L, H, distances]."""
    radii: dict[int, Radii]
    """Length in tokens -> measured at it."""

    @property
    def context(self) -> Radii:
        """At the model's own context."""
        return self.radii[min(self.radii)]


def rules_of(subject: Subject) -> dict[str, Mapping[str, Any]]:
    """Those of `RULES` that change something, and that the model can have."""
    own = rope_parameters(subject.model)
    found: dict[str, Mapping[str, Any]] = {}
    for name, parameters in RULES.items():
        if parameters and {**own, **parameters} == own:
            continue
        try:
            with rope(subject.model, parameters):
                found[name] = parameters
        except ValueError:  # Phi-3 has no scaling but its own
            continue
    return found


@contextmanager
def rope(model: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the model has these RoPE parameters; none change nothing."""
    before, positions = rope_parameters(model), model.config.max_position_embeddings
    try:
        if parameters:
            set_rope(model, **parameters)
        yield
    finally:
        replace_rope(model, before, positions)


def lengths(context: int) -> list[int]:
    """Those of the measured texts: the context, its double, and what YaRN is set for."""
    found = [n for n in (context, 2 * context, _STRETCHED * context) if n <= _LONGEST]
    return found or [_LONGEST]


def rotate(subject: Subject, settings: Settings, texts: int, rows: int) -> list[Rotated]:
    """The model on Python source under every rule: the same texts."""
    wanted = lengths(subject.context)
    read = subjects.read("source", subject, dict.fromkeys(wanted, texts), settings.seed)
    at = distances(max(wanted))
    found = []
    for name, parameters in rules_of(subject).items():
        settings.progress(f"{subject.name}, RoPE {name}")
        with rope(subject.model, parameters):
            norms = logit_norms(subject.model, at)
            radii = {
                n: measure(subject, "source", [x for x in read if len(x) == n], rows, settings.seed)
                for n in wanted
            }
        weight = torch.stack([norms[layer].weight for layer in subject.layers])
        found.append(Rotated(name, subject, at, weight, radii))
    return found
