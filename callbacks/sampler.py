"""Statistics of a few rows of attention, measured once for all monitors of the same settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.attention.probe import probe_rows, sample_rows
from lit_sparse.attention.row_statistics import STATISTICS, RowStatistics
from lit_sparse.callbacks.common import sparse_models
from lit_sparse.callbacks.step_seed import seed_of
from lit_sparse.models import Observation, budget_of, observe

Moment = tuple[int, int, int]
"""One micro-batch of a run: epoch, batch of the epoch, optimizer step."""


@dataclass(frozen=True)
class Settings:
    """What is sampled, and when; monitors of equal settings share one measurement."""

    every_n_steps: int
    rows: int
    min_context: int
    seed: int
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None

    def due(self, step: int) -> bool:
        """Whether an optimizer step, counted from 0, is measured: the first one, and those at which
        Lightning writes what was logged, were `log_every_n_steps` this interval.
        """
        return step == 0 or (step + 1) % self.every_n_steps == 0


@dataclass(frozen=True)
class Sample:
    """One measured step: the rows of all ranks, on the host, the same on every rank."""

    layers: Mapping[int, RowStatistics]
    """Layer number -> its rows, ascending. Layers of several models are numbered through; those of
    one model have the same rows.
    """
    similarity: Mapping[int, Tensor]
    """Layer number -> float32 [2, H]: how alike a head's outputs are in sampled rows, mean over
    ranks, each with as many rows as `layers` has of all. ||X - mean|| / ||X|| (the rank residual; 0
    where all rows get the same), and the mean cosine of two of them; NaN of a single row.
    """
    heads: tuple[int, ...]
    """Number of each of the H query heads; NaN stands for those that a layer lacks."""
    budgets: Mapping[int, Tensor]
    """Layer number -> int64 [R]: keys that the law gives each row."""

    def stack(self, name: str) -> Tensor:
        """A field or property of `RowStatistics`, of all layers and rows: [layers, R, H].

        Where layers have different numbers of rows, NaN fills up.
        """
        values = [getattr(rows, name).float() for rows in self.layers.values()]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=torch.nan)


class Sampler:
    """Observes one forward for all monitors of the same settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._moment: Moment | None = None
        self._taken: Sample | None = None
        self._watches: list[Observation] = []
        self._rows: dict[int, RowStatistics] = {}
        self._similarity: dict[int, Tensor] = {}
        self._budgets: dict[int, Tensor] = {}

    def start(self, trainer: Trainer, pl_module: LightningModule, moment: Moment) -> None:
        """Observe the forward that comes next; nothing if another monitor asked already."""
        if self._moment == moment:
            return
        self.stop()
        self._moment, first = moment, 0
        for model in sparse_models(pl_module):
            count = model.config.num_hidden_layers
            chosen = self.settings.layers
            own = range(count) if chosen is None else [i - first for i in chosen]
            observer = self._observer(trainer, model, first)
            watch = observe(model, observer, [i for i in own if 0 <= i < count])
            self._watches.append(watch)
            first += count

    def stop(self) -> None:
        """Observe no more, and forget what was observed."""
        for watch in self._watches:
            watch.remove()
        self._watches, self._moment, self._taken = [], None, None
        self._rows, self._similarity, self._budgets = {}, {}, {}

    def take(self, trainer: Trainer, pl_module: LightningModule, moment: Moment) -> Sample | None:
        """What was observed since `start` of that moment, of all ranks; None if that is over."""
        if self._moment != moment:
            return None
        if self._taken is None:
            sample = self._gather(trainer, pl_module)
            self.stop()
            self._moment, self._taken = moment, sample
        return self._taken

    def _observer(self, trainer: Trainer, model: Any, first: int) -> Callable[..., None]:
        chosen, (_, step) = self.settings, cast(Moment, self._moment)[1:]
        heads = _heads_of(model, chosen.heads)
        share = -(-chosen.rows // trainer.world_size)
        seed = seed_of(chosen.seed, step, trainer.global_rank)

        def observer(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            out: Tensor,
            lse: Tensor,
            selection: Selection,
            scale: float,
            documents: Any,
        ) -> None:
            if first + layer in self._rows:
                return  # of several calls in a step (a generation behind it) the first one counts
            # The same rows in every layer: what differs between two of them is the layer.
            generator = torch.Generator().manual_seed(seed)
            rows = sample_rows(selection.plan, share, generator, chosen.min_context)
            if not len(rows) or not heads:
                return
            found = probe_rows(q, k, v, selection, rows, scale, out=out, lse=lse, heads=heads)
            self._rows[first + layer] = found
            # As many as `rows` on each rank: a share may be one row, which is alike to nothing.
            generator.manual_seed(seed)
            rows = sample_rows(selection.plan, chosen.rows, generator, chosen.min_context)
            self._similarity[first + layer] = _similarity(out[rows.to(out.device)][:, heads])
            self._budgets[first + layer] = budget_of(model, layer)(found.context)

        return observer

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> Sample:
        layers, most = layers_and_heads(pl_module)
        chosen = self.settings
        numbers = list(range(layers) if chosen.layers is None else chosen.layers)
        shown = tuple(range(most) if chosen.heads is None else chosen.heads)
        # Of one size on all ranks, whatever each of them saw; NaN where it saw nothing.
        size = (len(numbers), -(-chosen.rows // trainer.world_size), len(shown), len(STATISTICS))
        values = torch.full(size, torch.nan, device=pl_module.device)
        places = torch.full((*size[:2], 2), -1, device=pl_module.device)
        alike = torch.full((len(numbers), 2, len(shown)), torch.nan, device=pl_module.device)
        for i, layer in enumerate(numbers):
            if (found := self._rows.get(layer)) is not None:
                count, heads = found.kl.shape
                stacked = torch.stack([getattr(found, name) for name in STATISTICS], -1)
                values[i, :count, :heads] = stacked.to(values)
                places[i, :count, 0] = found.context.to(places.device)
                places[i, :count, 1] = self._budgets[layer].to(places.device)
                alike[i, :, :heads] = self._similarity[layer]
        if trainer.world_size > 1:

            def gather(x: Tensor) -> Tensor:
                return cast(Tensor, pl_module.all_gather(x))

            values, places = (gather(x).transpose(0, 1).flatten(1, 2) for x in (values, places))
            alike = gather(alike).nanmean(0)
        values, places, alike = values.cpu(), places.cpu(), alike.cpu()
        rows, similarity, budgets = {}, {}, {}
        for i, layer in enumerate(numbers):
            real = places[i, :, 0] >= 0
            if real.any():
                context, budgets[layer] = places[i, real].unbind(-1)
                columns = dict(zip(STATISTICS, values[i, real].unbind(-1), strict=True))
                rows[layer] = RowStatistics(context, **columns)
                similarity[layer] = alike[i]
        return Sample(rows, similarity, shown, budgets)


_samplers: WeakKeyDictionary[Trainer, dict[Settings, Sampler]] = WeakKeyDictionary()


def sampler_of(trainer: Trainer, settings: Settings) -> Sampler:
    """The one sampler of a trainer for these settings."""
    return _samplers.setdefault(trainer, {}).setdefault(settings, Sampler(settings))


def layers_and_heads(pl_module: LightningModule) -> tuple[int, int]:
    """Attention layers of all sparse models together, and query heads of the one with the most."""
    configs = [model.config for model in sparse_models(pl_module)]
    heads = max(config.num_attention_heads for config in configs)
    return sum(config.num_hidden_layers for config in configs), heads


def _heads_of(model: Any, chosen: tuple[int, ...] | None) -> list[int]:
    own = range(model.config.num_attention_heads)
    return [head for head in (own if chosen is None else chosen) if head in own]


def _similarity(x: Tensor) -> Tensor:
    """x [R, H, D] -> float32 [2, H], see `Sample.similarity`."""
    if len(x) < 2:
        return x.new_full((2, x.shape[1]), torch.nan, dtype=torch.float32)
    x = x.float()
    tiny = torch.finfo(x.dtype).tiny
    spread = (x - x.mean(0)).square().sum((0, 2)) / x.square().sum((0, 2)).clamp(min=tiny)
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=tiny)
    pairs = len(x) * (len(x) - 1)
    cosine = (unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))) / pairs
    return torch.stack([spread.sqrt(), cosine])
