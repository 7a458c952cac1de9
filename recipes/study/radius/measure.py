"""R = B^2 ||W||_F of every layer and head, beside the logits that a dense run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_sparse import theory
from lit_sparse.attention.need import rows_need
from lit_sparse.attention.probe import probe_rows
from lit_sparse.models import observe
from lit_sparse.models.norms import LogitNorms, distances, logit_norms
from lit_sparse.recipes.calibrate.measure import late_rows
from lit_sparse.recipes.inspect.measure import watch_inputs
from lit_sparse.recipes.study.entries import Entries
from lit_sparse.recipes.study.subjects import Subject

MISSED = 0.05
DELTA = 0.01
"""Chance that the predicted largest logit may be passed."""

_JUDGED = 256
"""Last tokens of a text, whose loss is taken."""


@dataclass(frozen=True)
class Radii:
    """A model on texts of one kind and length; L layers, H heads, tensors float64 [L, H]."""

    subject: Subject
    kind: str
    """Of the texts; see `subjects.KINDS`."""
    length: int
    pairs: int
    """Query and key pairs that were looked at, of each head."""
    inputs: list[Entries]
    """By layer."""
    norms: list[LogitNorms]
    """By layer, at distances up to the length."""
    spread: Tensor
    """Standard deviation of a row's logits in nats, mean over rows."""
    largest: Tensor
    """Largest absolute logit."""
    share: Tensor
    """k / n: keys that miss 5 % of a row's mass, of those that it sees; mean over rows."""
    loss: float
    """Mean of the last tokens, in nats."""

    @property
    def label(self) -> str:
        return f"{self.subject.name}, {self.subject.weights} weights"

    @property
    def weight(self) -> Tensor:
        """||W||_F with the rotation of RoPE, root mean square over distances."""
        return torch.stack([norms.mean_weight for norms in self.norms])

    @property
    def by_largest(self) -> Tensor:
        """R with the largest entry for B."""
        return theory.logit_scale(self._scale("largest"), self.weight)

    @property
    def by_rms(self) -> Tensor:
        """R with the root mean square of the entries for B: the logits' standard deviation, were
        the entries independent."""
        return theory.logit_scale(self._scale("rms"), self.weight)

    @property
    def bound(self) -> Tensor:
        """The largest logit that R predicts, with the largest entry for B."""
        return self._predicted("largest")

    @property
    def estimate(self) -> Tensor:
        """The same with the root mean square."""
        return self._predicted("rms")

    def _scale(self, name: str) -> Tensor:
        return torch.tensor([getattr(x, name) for x in self.inputs], dtype=torch.float64)[:, None]

    def _predicted(self, name: str) -> Tensor:
        return torch.stack(
            [
                norms.largest_logit(getattr(x, name), self.pairs, DELTA)
                for x, norms in zip(self.inputs, self.norms, strict=True)
            ]
        )


@torch.no_grad()
def measure(subject: Subject, kind: str, texts: Sequence[Tensor], rows: int, seed: int) -> Radii:
    """Run texts of one length, with the rotation that the model has now; `rows` of the last
    quarter of each are looked at, the same in all layers."""
    drawn = torch.empty(0, dtype=torch.int64)
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {n: [] for n in subject.layers}
    inputs = {layer: Entries() for layer in subject.layers}

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> None:
        out, lse, selection, options, _ = others
        seen = probe_rows(q, k, v, selection, drawn, options, out=out, lse=lse)
        need = rows_need(q, k, drawn, missed=MISSED, sink=0, local=0, options=options)
        found[layer].append((seen.logit_std, seen.logit_max, need.keys / need.context[:, None]))

    generator = torch.Generator().manual_seed(seed)
    losses, pairs = [], 0
    with observe(subject.model, look, subject.layers), watch_inputs(subject.model, inputs):
        for text in texts:
            drawn = late_rows(len(text), rows, generator)
            pairs += int((drawn + 1).sum())
            losses.append(_loss(subject.model, text))
    norms = logit_norms(subject.model, distances(len(texts[0])))

    def by_head(which: int) -> list[Tensor]:
        """[rows, H] of each layer."""
        return [torch.cat([each[which] for each in found[n]]).double() for n in subject.layers]

    return Radii(
        subject,
        kind,
        len(texts[0]),
        pairs,
        list(inputs.values()),
        [norms[layer] for layer in subject.layers],
        spread=torch.stack([x.mean(0) for x in by_head(0)]),
        largest=torch.stack([x.amax(0) for x in by_head(1)]),
        share=torch.stack([x.mean(0) for x in by_head(2)]),
        loss=sum(losses) / len(losses),
    )


def _loss(model: Any, text: Tensor) -> float:
    kept = min(_JUDGED, len(text) - 1)
    logits = model(input_ids=text[None], use_cache=False, logits_to_keep=kept + 1).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), text[-kept:]).item()
