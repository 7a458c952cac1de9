"""What the monitors share: exact statistics of a few rows of attention, at an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_sparse.attention import Selection
from lit_sparse.attention.probe import STATISTICS, RowStatistics, probe_rows, sample_rows
from lit_sparse.callbacks.common import sparse_models
from lit_sparse.callbacks.step_seed import seed_of
from lit_sparse.models import Observation, budget_of, observe


@dataclass(frozen=True)
class Settings:
    """What is sampled, and when; monitors of equal settings share one measurement."""

    every_n_steps: int
    rows: int
    min_context: int
    seed: int
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None


@dataclass(frozen=True)
class Sample:
    """One measured step: the rows of all ranks, on the host, the same on every rank."""

    layers: Mapping[int, RowStatistics]
    """Layer number -> its rows, ascending. All layers of a model have the same rows."""
    similarity: Mapping[int, Tensor]
    """Layer number -> float32 [2, H]: how alike the outputs of a head are in the sampled rows.
    ||X - mean|| / ||X|| (the rank residual; 0 where all rows get the same), and the mean cosine of
    two of them.
    """
    heads: tuple[int, ...]
    """Number of each of the H query heads."""
    budgets: Mapping[int, Tensor]
    """Layer number -> int64 [R]: keys that the law gives each row."""

    def stack(self, name: str) -> Tensor:
        """A field or property of `RowStatistics`, of all layers and rows: [layers, R, H].

        Where layers have different numbers of rows, NaN fills up.
        """
        values = [getattr(rows, name).float() for rows in self.layers.values()]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=torch.nan)


class SampledAttentionMonitor(Callback):
    """Watches the attention of training steps without changing them.

    In the first micro-batch of every `every_n_steps`-th optimizer step each layer's queries, keys
    and values are observed where they pass, detached, and `rows` query rows of them are compared
    with their whole context. Rows come from a generator of their own, seeded by the step, so that
    the run is bitwise the same with and without a monitor, and resumes exactly. Monitors with the
    same settings share the measurement. Under several ranks each samples its own rows, and all get
    those of all.

    Args:
        every_n_steps: optimizer steps between measurements.
        rows: query rows sampled in each layer, on each rank.
        min_context: keys that a sampled row sees at least.
        seed: of the rows.
        layers: layers to watch; None: all.
        heads: query heads to watch; None: all.

    Raises:
        ValueError: a value out of its range, a layer or head that the model does not have, or no
            sparse model; when fitting starts at the latest.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        rows: int = 64,
        min_context: int = 64,
        seed: int = 0,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("rows", rows),
            ("min_context", min_context),
        ):
            if value < 1:
                raise ValueError(f"{type(self).__name__} {name} must be >= 1, got {value}")
        for name, chosen in (("layers", layers), ("heads", heads)):
            if chosen is not None and not chosen:
                raise ValueError(f"{type(self).__name__} {name} is empty; null watches all")
        self.settings = Settings(
            every_n_steps,
            rows,
            min_context,
            seed,
            None if layers is None else tuple(sorted(set(layers))),
            None if heads is None else tuple(sorted(set(heads))),
        )

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        """What a monitor does with a measured step; called on every rank with the same sample, at
        the end of the step's first micro-batch.
        """

    # -- Lightning --

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: a SparseAttention callback may stand behind this one.
        sparse_models(pl_module)
        name = type(self).__name__
        for key, there in zip(("layers", "heads"), _layers_and_heads(pl_module), strict=True):
            unknown = sorted(set(getattr(self.settings, key) or ()) - set(range(there)))
            if unknown:
                raise ValueError(
                    f"{name} {key} names {unknown}, but the model has {key} 0 to {there - 1}"
                )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.global_step % self.settings.every_n_steps == 0:
            _sampler(trainer, self.settings).start(pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            sample = _sampler(trainer, self.settings).take(trainer, pl_module, batch_idx)
            if sample is not None and sample.layers:
                self.finish(trainer, pl_module, sample)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        _sampler(trainer, self.settings).stop()


class Sampler:
    """Observes one forward for all monitors of the same settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._step: int | None = None
        self._watches: list[Observation] = []
        self._rows: dict[int, RowStatistics] = {}
        self._similarity: dict[int, Tensor] = {}
        self._budgets: dict[int, Tensor] = {}
        self._taken: tuple[int, Sample | None] = (-1, None)

    def start(self, pl_module: LightningModule, step: int) -> None:
        """Observe the forward that comes next; nothing if another monitor asked already."""
        if self._step == step:
            return
        self.stop()
        self._step = step
        first = 0
        for model in sparse_models(pl_module):
            count = model.config.num_hidden_layers
            wanted = self.settings.layers
            own = (
                None
                if wanted is None
                else [i - first for i in wanted if first <= i < first + count]
            )
            self._watches.append(observe(model, self._observer(first, model), own))
            first += count

    def stop(self) -> None:
        """Observe no more, and forget what was not taken."""
        for watch in self._watches:
            watch.remove()
        self._watches, self._step = [], None
        self._rows, self._similarity, self._budgets = {}, {}, {}

    def take(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> Sample | None:
        """What was observed in this micro-batch, of all ranks; None if nobody asked."""
        if self._step is not None:
            self._taken = (batch_idx, self._gather(trainer, pl_module))
            self.stop()
        return self._taken[1] if self._taken[0] == batch_idx else None

    def _observer(self, first: int, model: Any) -> Any:
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
            chosen = self.settings
            # The same rows in every layer: what differs between two of them is the layer.
            generator = torch.Generator().manual_seed(seed_of(chosen.seed, self._step or 0))
            rows = sample_rows(selection.plan, chosen.rows, generator, chosen.min_context)
            if not len(rows):
                return
            statistics = probe_rows(
                q, k, v, selection, rows, scale, out=out, lse=lse, heads=chosen.heads
            )
            x = out[rows.to(out.device)].float()
            x = x if chosen.heads is None else x[:, list(chosen.heads)]
            self._rows[first + layer] = statistics
            self._similarity[first + layer] = _similarity(x)
            law = budget_of(model, layer)
            self._budgets[first + layer] = law(statistics.context)

        return observer

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> Sample:
        layers, heads = _layers_and_heads(pl_module)
        numbers = list(self.settings.layers or range(layers))
        shown = self.settings.heads or tuple(range(heads))
        # Of one size on all ranks, whatever each of them saw; NaN where it saw nothing.
        size = (len(numbers), self.settings.rows, len(shown), len(STATISTICS))
        values = torch.full(size, torch.nan, device=pl_module.device)
        places = torch.full((*size[:2], 2), -1, device=pl_module.device)
        alike = torch.full((len(numbers), 2, len(shown)), torch.nan, device=pl_module.device)
        for i, layer in enumerate(numbers):
            if (found := self._rows.get(layer)) is not None:
                count = len(found.context)
                stacked = torch.stack([getattr(found, name) for name in STATISTICS], -1)
                values[i, :count] = stacked.to(values)
                places[i, :count, 0] = found.context.to(places.device)
                places[i, :count, 1] = self._budgets[layer].to(places.device)
                alike[i] = self._similarity[layer]
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


def _sampler(trainer: Trainer, settings: Settings) -> Sampler:
    return _samplers.setdefault(trainer, {}).setdefault(settings, Sampler(settings))


def _layers_and_heads(pl_module: LightningModule) -> tuple[int, int]:
    configs = [model.config for model in sparse_models(pl_module)]
    heads = min(config.num_attention_heads for config in configs)
    return sum(config.num_hidden_layers for config in configs), heads


def _similarity(x: Tensor) -> Tensor:
    """x [R, H, D] -> [2, H], see `Sample.similarity`."""
    tiny = torch.finfo(x.dtype).tiny
    spread = (x - x.mean(0)).square().sum((0, 2)) / x.square().sum((0, 2)).clamp(min=tiny)
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=tiny)
    pairs = max(len(x) * (len(x) - 1), 1)
    cosine = (unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))) / pairs
    return torch.stack([spread.sqrt(), cosine])


def log2_bucket(context: Tensor) -> Tensor:
    """The largest power of two that is at most n: contexts that are compared with each other."""
    return 2 ** context.double().log2().floor().long()


class Average:
    """Running means of layer x head values between two figures."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a measurement: name -> [layers, heads]."""
        for name, value in values.items():
            value = value.detach().double().cpu()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> dict[str, Tensor]:
        """The means since the last call; empty if nothing was measured."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._count = state_dict["sums"], state_dict["count"]
