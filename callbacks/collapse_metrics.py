"""The numbers of attention collapse, of a sample of rows: by row, and by head."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse.callbacks.sampled import Sample
from lit_sparse.theory import required_logit_range

SATURATED = 0.95
"""A row whose heaviest key, the sink left out, has more than this is saturated."""

_OF_ROWS = (
    "entropy",
    "entropy_ratio",
    "entropy_ratio_without_sink",
    "effective_support",
    "max_weight",
    "max_weight_without_sink",
    "participation",
    "jacobian_trace",
    "sink_mass",
    "logit_std",
    "logit_max",
    "logit_range",
    "gamma",
    "gamma_of_entropy",
)


def row_metrics(sample: Sample, missed: float = 0.05) -> dict[str, Tensor]:
    """Name -> float32 [layers, R, H]; NaN where a layer has fewer rows than another.

    Those of `RowStatistics`, and `jacobian_trace_without_sink`, `saturated` (1 or 0: the heaviest
    key, the sink left out, has more than 0.95) and `range_margin`, in nats: the row's logit range
    minus the least that lets its k(n) keys hold all but `missed` of the mass
    (`theory.required_logit_range`). Below 0 no choice of keys can.
    """
    found = {name: sample.stack(name) for name in _OF_ROWS}
    found["jacobian_trace_without_sink"] = 1 - sample.stack("collision_without_sink")
    heaviest = found["max_weight_without_sink"]
    found["saturated"] = torch.where(heaviest.isnan(), heaviest, (heaviest > SATURATED).float())
    margins = [
        rows.logit_range
        - required_logit_range(rows.context, sample.budgets[layer], missed)[:, None].float()
        for layer, rows in sample.layers.items()
    ]
    found["range_margin"] = torch.nn.utils.rnn.pad_sequence(
        margins, batch_first=True, padding_value=torch.nan
    )
    return found


def head_metrics(sample: Sample, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> float32 [layers, H]: means of `row_metrics` over rows (the largest `logit_max`), and
    how alike a head's outputs are: `rank_residual`, ||X - mean|| / ||X||, and `cosine`, the mean of
    two rows' (near 0 and near 1 where all tokens get the same).
    """
    found = {name: values.nanmean(1) for name, values in rows.items()}
    largest = rows["logit_max"]
    most = largest.nan_to_num(-torch.inf).amax(1)
    found["logit_max"] = torch.where(found["logit_max"].isnan(), torch.nan, most)
    residual, cosine = torch.stack(list(sample.similarity.values())).unbind(1)
    return {**found, "rank_residual": residual, "cosine": cosine}


def spread(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> its 5th and 95th percentile, as NAME_p5 and NAME_p95, NaN left out."""
    shares = torch.tensor([0.05, 0.95])
    found = {}
    for name, value in values.items():
        found[f"{name}_p5"], found[f"{name}_p95"] = value.flatten().nanquantile(shares)
    return found
