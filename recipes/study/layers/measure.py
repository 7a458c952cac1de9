"""The dense run: what late rows of every layer and head need, and where their mass is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_sparse.attention.need import RowNeed, rows_need
from lit_sparse.attention.options import Options
from lit_sparse.attention.row_statistics import SINK_TOKENS
from lit_sparse.calibration import Needs
from lit_sparse.models import observe
from lit_sparse.recipes.calibrate.measure import late_rows
from lit_sparse.recipes.inspect.measure import watch_inputs
from lit_sparse.recipes.study.entries import Entries
from lit_sparse.recipes.study.subjects import Subject

SINK, LOCAL = SINK_TOKENS, 16
"""Tokens at a text's start, and nearest ones, that are told apart from the rest."""

VIEWS = {"all": (0, 0), "far": (SINK, LOCAL)}
"""Name -> sink and local tokens that are left out: the rest is renormalised, and is the context."""

MISSED = (0.05, 0.1)


@dataclass(frozen=True)
class Measured:
    """A model on texts of one kind: N rows, L layers, H heads."""

    subject: Subject
    kind: str
    """Of the texts; see `subjects.KINDS`."""
    needs: dict[tuple[str, float], Needs]
    """By view and missed mass; keys and contexts are those of the view alone."""
    sink_mass: Tensor
    """[N, L, H], of the first SINK tokens."""
    local_mass: Tensor
    """[N, L, H], of the nearest LOCAL tokens, the row's own included."""
    inputs: dict[int, Entries]
    lengths: Tensor
    """int64 [N], of the text that a row is of."""

    def by_length(self) -> dict[int, Tensor]:
        """Length -> rows of its texts, bool [N]; ascending."""
        return {n: self.lengths == n for n in self.lengths.unique().tolist()}

    @property
    def label(self) -> str:
        return f"{self.subject.name}, {self.subject.weights} weights, on {self.kind}"


@torch.no_grad()
def measure(subject: Subject, kind: str, texts: Sequence[Tensor], rows: int, seed: int) -> Measured:
    """Run every text once, and look at `rows` of its last quarter, the same in all layers."""
    drawn = torch.empty(0, dtype=torch.int64)
    found: dict[int, dict[tuple[str, float], RowNeed]] = {}
    masses: dict[int, tuple[Tensor, Tensor]] = {}
    inputs = {layer: Entries() for layer in subject.layers}

    def look(
        layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any
    ) -> None:
        options = others[1]
        found[layer] = {
            (view, missed): without(q, k, drawn, *VIEWS[view], missed, options)
            for view in VIEWS
            for missed in MISSED
        }
        masses[layer] = part_masses(q, k, lse, drawn, options)

    generator = torch.Generator().manual_seed(seed)
    measured: dict[tuple[str, float], list[tuple[int, list[RowNeed]]]] = {}
    sinks, locals_ = [], []
    with observe(subject.model, look, subject.layers), watch_inputs(subject.model, inputs):
        for number, text in enumerate(texts):
            drawn = late_rows(len(text), rows, generator)
            # The base model: nobody reads the logits of the vocabulary.
            subject.model.base_model(input_ids=text[None], use_cache=False)
            for key in found[subject.layers[0]]:
                own = [found[layer][key] for layer in subject.layers]
                measured.setdefault(key, []).append((number, own))
            sinks.append(torch.stack([masses[layer][0] for layer in subject.layers], 1))
            locals_.append(torch.stack([masses[layer][1] for layer in subject.layers], 1))
    needs = {
        key: Needs.gather(each, missed=key[1], sink=0, local=0, layers=subject.layers)
        for key, each in measured.items()
    }
    lengths = torch.tensor([len(text) for text in texts])[needs["all", MISSED[0]].document]
    return Measured(subject, kind, needs, torch.cat(sinks), torch.cat(locals_), inputs, lengths)


def without(
    q: Tensor, k: Tensor, rows: Tensor, sink: int, local: int, missed: float, options: Options
) -> RowNeed:
    """`rows_need` where sink and local tokens are not there at all: nobody keeps or counts them."""
    need = rows_need(q, k, rows, missed=missed, sink=sink, local=local, options=options)
    left_out = sink + local
    counted = {name: getattr(need, name) - left_out for name in ("keys", "block_keys")}
    return replace(need, context=need.context - left_out, **counted)


def part_masses(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Mass of the first SINK and the nearest LOCAL tokens of one document, [R, H] each.

    q [T, Hq, D], k [T, Hkv, D], lse [T, Hq]; rows see more than SINK + LOCAL tokens.
    """
    first = torch.arange(SINK).expand(len(rows), -1)
    nearest = rows[:, None] - torch.arange(LOCAL)
    queries = q[rows].unflatten(1, (k.shape[1], -1))

    def mass(columns: Tensor) -> Tensor:
        products = torch.einsum("rkgd,rckd->rkgc", queries, k[columns]).flatten(1, 2)
        logits = options.cap(products * options.scale)
        return (logits.logsumexp(-1) - lse[rows]).exp()

    return mass(first), mass(nearest)
