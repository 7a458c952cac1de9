"""What the monitors share: a callback that gets a sample of attention rows at an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lit_sparse.callbacks.common import add_figure, sparse_models
from lit_sparse.callbacks.heatmap import heat_maps
from lit_sparse.callbacks.sampler import Moment, Sample, Settings, layers_and_heads, sampler_of
from lit_sparse.models import windows_everywhere


class SampledAttentionMonitor(Callback):
    """Watches the attention of training steps without changing them.

    In the first micro-batch of the first optimizer step, and of every `every_n_steps`-th one, each
    layer's queries, keys and values are observed where they pass (the first time in the step),
    detached, and `rows` query rows of them are compared with their whole context. Rows come from a
    generator of their own, seeded by the step, so that the run is bitwise the same with and without
    a monitor, and resumes exactly. Monitors with the same settings share the measurement. Of
    several data-parallel ranks each samples its share, of ranks that share a row each measures its
    heads, and all get the rows and heads of all.

    Args:
        every_n_steps: optimizer steps between measurements.
        rows: query rows sampled in each layer, by all data-parallel ranks together (a multiple of
            their number).
        min_context: keys that a sampled row sees at least.
        seed: of the rows.
        layers: layers to watch; None: all that obey a law (one with a sliding window of its own
            loses nothing).
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
        if seed < 0:
            raise ValueError(f"{type(self).__name__} seed must be >= 0, got {seed}")
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
        self._moment: Moment | None = None
        self._layers: Sequence[int] | None = self.settings.layers
        """Numbers of the rows of a figure; None: from 0."""

    @property
    def watched(self) -> list[list[int] | None]:
        """Layers and heads, None for all: what is kept by layer and head holds only for these."""
        chosen = (self.settings.layers, self.settings.heads)
        return [None if numbers is None else list(numbers) for numbers in chosen]

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        """What a monitor does with a measured step; called on every rank with the same sample, at
        the end of the step's first micro-batch.
        """

    def draw(self, trainer: Trainer, tag: str, title: str, panels: Mapping[str, Tensor]) -> None:
        """A figure of values by layer and head, [layers, heads] each; all-NaN ones are left out."""
        real = {name: value for name, value in panels.items() if not value.isnan().all()}
        if real:
            numbers = {"layers": self._layers, "heads": self.settings.heads}
            title = f"{title}, step {trainer.global_step}"
            add_figure(trainer, tag, partial(heat_maps, real, title, **numbers))

    # -- Lightning --

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: a SparseAttention callback may stand behind this one.
        models, name = sparse_models(pl_module), type(self).__name__
        layers, heads = layers_and_heads(pl_module)
        if not layers:
            rank_zero_warn(f"{name} measures nothing: {windows_everywhere(models[0])}")
        for key, there in (("layers", layers), ("heads", heads)):
            unknown = sorted(set(getattr(self.settings, key) or ()) - set(there))
            if unknown:
                raise ValueError(f"{name} {key} names {unknown}, but {_known(key, there)}")
        if layers != list(range(len(layers))):
            self._layers = self._layers or layers

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        self._moment = None
        if first and self.settings.due(trainer.global_step):
            self._moment = (trainer.current_epoch, batch_idx, trainer.global_step)
            sampler_of(trainer, self.settings).start(trainer, pl_module, self._moment)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._moment is not None:
            sampler = sampler_of(trainer, self.settings)
            sample = sampler.take(trainer, pl_module, self._moment)
            if sample is not None and sample.layers:
                self.finish(trainer, pl_module, sample)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._moment = None
        sampler_of(trainer, self.settings).stop()


def _known(key: str, there: Sequence[int]) -> str:
    if list(there) == list(range(len(there))):
        return f"the model has {key} 0 to {len(there) - 1}"
    return f"{key} {', '.join(map(str, there))} have no sliding window of their own"


def log2_bucket(context: Tensor) -> Tensor:
    """The largest power of two that is at most n: contexts that are compared with each other."""
    return 2 ** context.double().log2().floor().long()


class Average:
    """Running means of layer x head values between two figures; NaN is no value."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add a measurement: name -> [layers, heads]."""
        for name, value in values.items():
            value = value.detach().double().cpu()
            zero = torch.zeros_like(value)
            if self._sums.get(name, zero).shape != value.shape:
                continue  # of several models, not all ran in this step
            self._sums[name] = self._sums.get(name, zero) + value.nan_to_num(0.0)
            self._counts[name] = self._counts.get(name, zero) + ~value.isnan()

    def take(self) -> dict[str, Tensor]:
        """The means since the last call, NaN where there was no value; empty if none was added."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._counts = state_dict["sums"], state_dict["counts"]
