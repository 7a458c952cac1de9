"""How far the sparse model is from itself run densely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lit_sparse.callbacks.common import add_figure, sparse_models
from lit_sparse.callbacks.heatmap import heat_maps
from lit_sparse.callbacks.sampled import Average, Sample, SampledAttentionMonitor
from lit_sparse.models import dense_attention


class DenseGapMonitor(SampledAttentionMonitor):
    """Log what sparse attention loses against dense attention, exactly, while it trains.

    On sampled rows of training steps: `gap/captured_mass` (dense softmax mass of the kept keys,
    1 - tau), its 5th percentile `gap/captured_mass_p5`, `gap/missed_mass` (tau), `gap/output_error`
    (relative) and its 95th percentile, and captured mass by layer. On the first validation batches,
    which run a second time with dense attention: `gap/kl` (KL of dense to sparse next-token
    distributions, nats a token) and `gap/loss_delta` (sparse - dense loss, nats a token). After a
    validation a figure shows missed mass and output error by layer and head.

    Args:
        every_n_steps, rows, min_context, seed, layers, heads: see `SampledAttentionMonitor`.
        validation_batches: batches of each validation that also run densely.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        rows: int = 64,
        min_context: int = 64,
        seed: int = 0,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        validation_batches: int = 2,
    ) -> None:
        super().__init__(every_n_steps, rows, min_context, seed, layers, heads)
        if validation_batches < 0:
            raise ValueError(
                f"DenseGapMonitor validation_batches must be >= 0, got {validation_batches}"
            )
        self.validation_batches = validation_batches
        self._average = Average()
        self._hook: Any = None
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None
        self._sums: Tensor | None = None

    def finish(self, trainer: Trainer, pl_module: LightningModule, sample: Sample) -> None:
        tau, error = sample.stack("tau"), sample.stack("output_error")
        mass = 1 - tau
        values = {
            "gap/captured_mass": mass.nanmean(),
            "gap/captured_mass_p5": mass.nanquantile(0.05),
            "gap/missed_mass": tau.nanmean(),
            "gap/output_error": error.nanmean(),
            "gap/output_error_p95": error.nanquantile(0.95),
        }
        for layer, value in zip(sample.layers, mass, strict=True):
            values[f"gap_by_layer/captured_mass_{layer:02d}"] = value.nanmean()
        pl_module.log_dict(values)
        self._average.add({"missed mass": tau.nanmean(1), "output error": error.nanmean(1)})

    # -- the same validation batch, densely --

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # nats of KL, of the sparse and of the dense loss; tokens of the KL and of the losses.
        self._sums = torch.zeros(5, dtype=torch.float64, device=pl_module.device)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx < self.validation_batches and dataloader_idx == 0:
            # Not the whole model: its caller may use the head in pieces, or not at all.
            decoder = sparse_models(pl_module)[0].base_model
            self._hook = decoder.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if self._call is None and kwargs.get("past_key_values") is None:
            self._call = (args, kwargs, output.last_hidden_state.detach())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
        call, self._hook, self._call = self._call, None, None
        model = sparse_models(pl_module)[0]
        head = model.get_output_embeddings()
        if call is None or head is None or self._sums is None:
            return
        args, kwargs, sparse = call
        with torch.no_grad(), dense_attention(model), trainer.precision_plugin.forward_context():
            dense = model.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
            ids = kwargs.get("input_ids", args[0] if args else None)
            targets, real = _targets(ids, kwargs, sparse)
            self._sums += _compare(sparse, dense, head, targets, real).to(self._sums)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sums is None:
            return
        gathered = cast(Tensor, pl_module.all_gather(self._sums))
        kl, sparse, dense, tokens, labels = gathered.view(-1, 5).sum(0)
        if tokens > 0:
            pl_module.log("gap/kl", (kl / tokens).float())
        if labels > 0:
            pl_module.log("gap/loss_delta", ((sparse - dense) / labels).float())

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average.load_state_dict(state_dict["average"])

    # -- the figure --

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if panels := self._average.take():
            figure = heat_maps(panels, f"Gap to dense attention, step {trainer.global_step}")
            add_figure(trainer, "gap/by_layer_and_head", figure)


def _targets(
    ids: Tensor | None, kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Next token of the same document, -100 where there is none; which tokens are real. [N]"""
    mask = kwargs.get("attention_mask")
    real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask is not None and mask.dim() == 2:
        real = mask.bool()
    targets = torch.full(hidden.shape[:2], -100, device=hidden.device)
    if ids is not None:
        follows = real[:, 1:] & real[:, :-1]
        positions = kwargs.get("position_ids")
        if positions is not None:
            follows = follows & (positions[:, 1:] == positions[:, :-1] + 1)
        targets[:, :-1] = torch.where(follows, ids[:, 1:], -100)
    return targets.flatten(), real.flatten()


def _compare(
    sparse: Tensor, dense: Tensor, head: Any, targets: Tensor, real: Tensor, chunk: int = 1024
) -> Tensor:
    """Sums over tokens, nats: KL(dense || sparse), sparse and dense loss; tokens, targets."""
    sums = torch.zeros(5, dtype=torch.float64, device=sparse.device)
    pairs = zip(
        sparse.flatten(0, 1).split(chunk),
        dense.flatten(0, 1).split(chunk),
        targets.split(chunk),
        real.split(chunk),
        strict=True,
    )
    for part_sparse, part_dense, target, is_real in pairs:
        ours = head(part_sparse).float().log_softmax(-1)
        theirs = head(part_dense).float().log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)[is_real]
        losses = [F.nll_loss(x, target, ignore_index=-100, reduction="sum") for x in (ours, theirs)]
        sums += torch.stack([kl.sum(), *losses, is_real.sum(), (target >= 0).sum()]).double()
    return sums
