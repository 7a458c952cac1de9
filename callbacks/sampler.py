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
from lit_sparse.attention.options import Options
from lit_sparse.attention.probe import probe_rows, sample_rows
from lit_sparse.attention.row_statistics import STATISTICS, RowStatistics
from lit_sparse.callbacks.common import sparse_models
from lit_sparse.callbacks.step_seed import seed_of
from lit_sparse.distributed import ranks_of
from lit_sparse.models import Observation, budget_of, law_layers, observe

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
    data-parallel ranks, each with as many rows as `layers` has of all. ||X - mean|| / ||X|| (the
    rank residual; 0 where all rows get the same), and the mean cosine of two of them; NaN of a
    single row.
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


@dataclass(frozen=True)
class _Seen:
    """What this rank measured of a layer: R of its rows and those of the H watched heads that it
    attends with.
    """

    columns: list[int]
    """Their places among all watched heads."""
    rows: RowStatistics
    similarity: Tensor
    """[2, H]"""
    budgets: Tensor
    """[R]"""


class Sampler:
    """Observes one forward for all monitors of the same settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._moment: Moment | None = None
        self._taken: Sample | None = None
        self._watches: list[Observation] = []
        self._seen: dict[int, _Seen] = {}

    def start(self, trainer: Trainer, pl_module: LightningModule, moment: Moment) -> None:
        """Observe the forward that comes next; nothing if another monitor asked already."""
        if self._moment == moment:
            return
        self.stop()
        self._moment, first = moment, 0
        heads = self._watched(pl_module)[1]
        for model in sparse_models(pl_module):
            chosen = self.settings.layers
            own = [i for i in law_layers(model) if chosen is None or first + i in chosen]
            observer = self._observer(trainer, model, first, heads)
            self._watches.append(observe(model, observer, own))
            first += model.config.num_hidden_layers

    def stop(self) -> None:
        """Observe no more, and forget what was observed."""
        for watch in self._watches:
            watch.remove()
        self._watches, self._moment, self._taken = [], None, None
        self._seen = {}

    def take(self, trainer: Trainer, pl_module: LightningModule, moment: Moment) -> Sample | None:
        """What was observed since `start` of that moment, of all ranks; None if that is over."""
        if self._moment != moment:
            return None
        if self._taken is None:
            sample = self._gather(trainer, pl_module)
            self.stop()
            self._moment, self._taken = moment, sample
        return self._taken

    def _watched(self, pl_module: LightningModule) -> tuple[list[int], list[int]]:
        """Numbers of the layers and of the query heads."""
        layers, heads = layers_and_heads(pl_module)
        return list(self.settings.layers or layers), list(self.settings.heads or heads)

    def _observer(
        self, trainer: Trainer, model: Any, first: int, watched: list[int]
    ) -> Callable[..., None]:
        chosen, (_, step) = self.settings, cast(Moment, self._moment)[1:]
        ranks = ranks_of(trainer)
        # Of the ranks that share a row each has some heads, all have to look at the same rows.
        seed = seed_of(chosen.seed, step, ranks.data_rank)
        share = -(-chosen.rows // ranks.data_size)
        own = ranks.own_heads(model.config.num_attention_heads)
        columns = [i for i, head in enumerate(watched) if own.start <= head < own.stop]
        heads = [watched[i] - own.start for i in columns]

        def observer(
            layer: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            out: Tensor,
            lse: Tensor,
            selection: Selection,
            options: Options,
            documents: Any,
        ) -> None:
            if first + layer in self._seen:
                return  # of several calls in a step (a generation behind it) the first one counts
            # The same rows in every layer: what differs between two of them is the layer.
            generator = torch.Generator().manual_seed(seed)
            rows = sample_rows(selection.plan, share, generator, chosen.min_context)
            if not len(rows) or not heads:
                return
            found = probe_rows(q, k, v, selection, rows, options, out=out, lse=lse, heads=heads)
            # As many as `rows` on each rank: a share may be one row, which is alike to nothing.
            generator.manual_seed(seed)
            rows = sample_rows(selection.plan, chosen.rows, generator, chosen.min_context)
            similarity = _similarity(out[rows.to(out.device)][:, heads])
            budgets = budget_of(model, layer)(found.context)
            self._seen[first + layer] = _Seen(columns, found, similarity, budgets)

        return observer

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> Sample:
        numbers, heads = self._watched(pl_module)
        ranks, device = ranks_of(trainer), pl_module.device
        # Of one size on all ranks, whatever each of them saw; NaN where it saw nothing.
        rows = -(-self.settings.rows // ranks.data_size)
        size = (len(numbers), rows, len(heads), len(STATISTICS))
        values = torch.full(size, torch.nan, device=device)
        places = torch.full((*size[:2], 2), -1, device=device)
        alike = torch.full((len(numbers), 2, len(heads)), torch.nan, device=device)
        for i, layer in enumerate(numbers):
            if (seen := self._seen.get(layer)) is not None:
                count = len(seen.rows.context)
                stacked = torch.stack([getattr(seen.rows, name) for name in STATISTICS], -1)
                values[i][:count, seen.columns] = stacked.to(values)
                places[i, :count, 0] = seen.rows.context.to(device)
                places[i, :count, 1] = seen.budgets.to(device)
                alike[i][:, seen.columns] = seen.similarity
        if trainer.world_size > 1:

            def gather(x: Tensor) -> Tensor:
                """[data-parallel ranks, ranks that share a row, ...]"""
                every = cast(Tensor, pl_module.all_gather(x))
                return every.unflatten(0, (ranks.data_size, ranks.sequence_size))

            # A head's values are on one of those that share a row; a mean of it alone is itself.
            values, places = gather(values).nanmean(1), gather(places).amax(1)
            values, places = (x.transpose(0, 1).flatten(1, 2) for x in (values, places))
            alike = gather(alike).nanmean((0, 1))
        values, places, alike = values.cpu(), places.cpu(), alike.cpu()
        layers, similarity, budgets = {}, {}, {}
        for i, layer in enumerate(numbers):
            real = places[i, :, 0] >= 0
            if real.any():
                context, budgets[layer] = places[i, real].unbind(-1)
                columns = dict(zip(STATISTICS, values[i, real].unbind(-1), strict=True))
                layers[layer] = RowStatistics(context, **columns)
                similarity[layer] = alike[i]
        return Sample(layers, similarity, tuple(heads), budgets)


_samplers: WeakKeyDictionary[Trainer, dict[Settings, Sampler]] = WeakKeyDictionary()


def sampler_of(trainer: Trainer, settings: Settings) -> Sampler:
    """The one sampler of a trainer for these settings."""
    return _samplers.setdefault(trainer, {}).setdefault(settings, Sampler(settings))


def layers_and_heads(pl_module: LightningModule) -> tuple[list[int], list[int]]:
    """Numbers of the layers that obey a law, those of all sparse models numbered through, and of
    the query heads of the model with the most.
    """
    layers, heads, first = [], 0, 0
    for model in sparse_models(pl_module):
        layers += [first + layer for layer in law_layers(model)]
        heads = max(heads, model.config.num_attention_heads)
        first += model.config.num_hidden_layers
    return layers, list(range(heads))


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
