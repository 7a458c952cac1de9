"""What Lightning remembers of logged metrics: a part of a run's state that it does not save.

A metric that is logged seldom stands in TensorBoard, in the progress bar and in `callback_metrics`
with its last value until it is logged again. A resumed run must show the same.
"""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer


def logged_state(trainer: Trainer) -> dict[str, Any]:
    """The last values of all metrics, as tensors and plain types."""
    connector: Any = trainer._logger_connector
    return {
        "callback": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        "logged": {name: value.cpu() for name, value in trainer.logged_metrics.items()},
        "progress_bar": dict(connector.progress_bar_metrics),
        "steps": [
            _metric_state(metric)
            for metric in trainer.fit_loop.epoch_loop._results.values()
            if metric.is_tensor and not metric.has_reset
        ],
    }


def restore_logged(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put back what `logged_state` returned, before the first batch."""
    connector: Any = trainer._logger_connector
    connector._callback_metrics.update(state["callback"])
    connector._logged_metrics.update(state["logged"])
    connector._progress_bar_metrics.update(state["progress_bar"])
    # In the first batch of an epoch Lightning forgets what the epoch before logged.
    connector._first_loop_iter = False
    results = trainer.fit_loop.epoch_loop._results
    for metric in state["steps"]:
        _restore_metric(trainer, results, **metric)


def _metric_state(metric: Any) -> dict[str, Any]:
    meta, latest = metric.meta, metric._forward_cache
    return {
        "fx": meta.fx,
        "name": meta.name,
        "shown": {"prog_bar": meta.prog_bar, "logger": meta.logger},
        "taken": {"on_step": meta.on_step, "on_epoch": meta.on_epoch},
        "reduce": meta.reduce_fx.__name__,
        "synchronised": {"sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only},
        "latest": None if latest is None else latest.cpu(),
        "total": metric.value.cpu(),
        "count": metric.cumulated_batch_size.cpu() if meta.is_mean_reduction else None,
    }


def _restore_metric(
    trainer: Trainer,
    results: Any,
    fx: str,
    name: str,
    shown: dict[str, bool],
    taken: dict[str, bool],
    reduce: str,
    synchronised: dict[str, bool],
    latest: Any,
    total: Any,
    count: Any,
) -> None:
    device = trainer.strategy.root_device
    # Logged as it was, so that Lightning finds the same description when it is logged again.
    results.log(
        fx,
        name,
        total.to(device),
        reduce_fx=reduce,
        sync_dist_fn=trainer.strategy.reduce,
        **shown,
        **taken,
        **synchronised,
    )
    metric = results[f"{fx}.{name}"]
    metric.value = total.to(device)
    metric._forward_cache = None if latest is None else latest.to(device)
    if count is not None:
        metric.cumulated_batch_size = count.to(device)
