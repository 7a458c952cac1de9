"""What the benchmark of a training step prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lit_sparse.recipes.benchmark.peers import OUT_OF_MEMORY
from lit_sparse.recipes.benchmark.report import number, render_table, short, wrap
from lit_sparse.recipes.benchmark.shapes import SHAPES
from lit_sparse.recipes.benchmark.training import Task

Report = dict[str, Any]

LABELS = {
    "sparse": "sparse",
    "sdpa": "transformers' sdpa attention",
    "flash": "transformers' sdpa attention by the flash kernel",
    "cudnn": "transformers' sdpa attention by cuDNN",
    "own": "lit-sparse's dense fallback",
}

NOTE = (
    "Whole steps: forward, loss, backward, AdamW; one row of one document; medians. pairs: "
    "executed / causal pairs. IQR: interquartile range / median. {unit}: of the executed FLOPs "
    "(recomputation and selection included; of dense attention all causal pairs); dense-eq: as if "
    "sparse attention had computed all causal pairs too. MiB: peak, weights and optimizer states "
    "included. ratio: tokens/s, median over turns of a sparse and a dense step, and MiB, sparse / "
    "dense. dense: the faster kernel; {kernels}."
)


def title(task: Task, parameters: int, device: str) -> str:
    shape = SHAPES[task.shape]
    layers = f"{task.layers} layers" + ("" if task.layers == shape.whole else f" of {shape.whole}")
    architecture = shape.architecture
    extras = [f"activations {task.activations}", f"loss {task.loss}"]
    extras += ["Liger's kernels"] * task.liger_kernels + ["compiled"] * task.compile
    return (
        f"Training step of {task.shape} on {device}: {layers}, hidden "
        f"{architecture['hidden_size']}, {architecture['num_attention_heads']} query / "
        f"{architecture['num_key_value_heads']} key-value heads of {architecture['head_dim']}, MLP "
        f"{architecture['intermediate_size']}, vocabulary {architecture['vocab_size']} "
        f"({parameters / 1e6:,.0f}M parameters), {task.dtype}, {', '.join(extras)}; {task.budget}, "
        f"block {task.block}"
    )


def lines(report: Report, head: str) -> list[str]:
    """All that the terminal shows of a finished run."""
    results = report["results"]
    unit = "GFLOP/s" if report["peak_tflops"] is None else "MFU"
    groups = (
        ("law", ("length", "k(n)", "pairs")),
        ("sparse", ("s/step", "IQR", "tokens/s", unit, "dense-eq", "MiB")),
        ("dense", ("s/step", "IQR", "tokens/s", unit, "MiB", "kernel")),
        ("ratio", ("speed", "MiB")),
    )
    rows = [cells(result, unit) for result in results]
    used = dict.fromkeys(r["dense"]["attention"] for r in results if "dense" in r)
    kernels = ", ".join(f"{label}: {LABELS[label]}" for label in used) or "none ran"
    printed = [*wrap(head), "", *render_table(groups, rows), ""]
    printed += wrap(NOTE.format(unit=unit, kernels=kernels))
    for line in _skipped(results):
        printed += wrap(line)
    return printed


def cells(result: Report, unit: str) -> list[str]:
    """The row of one length; "OOM" where a side ran out of memory."""
    sparse, dense, ratio = (result.get(name) for name in ("sparse", "dense", "ratio"))
    ratio = ratio or {"tokens_per_second": None, "peak": None}
    reasons = dict(result["skipped"])
    own = reasons.pop("sparse", None)
    return [
        str(result["length"]),
        str(result["keys"]),
        number(result["executed_share"], 3),
        *_side(sparse, unit, [own]),
        _rate(sparse, unit, "dense_equivalent"),
        _peak(sparse),
        *_side(dense, unit, reasons.values()),
        _peak(dense),
        "-" if dense is None else dense["attention"],
        number(ratio["tokens_per_second"], 2),
        number(ratio["peak"], 2),
    ]


def _side(side: Report | None, unit: str, reasons: Iterable[str | None]) -> list[str]:
    if side is None:
        return ["OOM" if OUT_OF_MEMORY in reasons else "-", "-", "-", "-"]
    quartiles, seconds = side["quartiles_s"], side["seconds"]
    return [
        number(seconds, 3 if seconds < 10 else 1),
        "-" if quartiles is None else f"{(quartiles[1] - quartiles[0]) / seconds:.1%}",
        f"{side['tokens_per_second']:,.0f}",
        _rate(side, unit, "executed"),
    ]


def _rate(side: Report | None, unit: str, which: str) -> str:
    if side is None:
        return "-"
    if unit == "MFU":
        return f"{side['mfu'][which]:.1%}"
    return short(side["tflops"][which] * 1000)


def _peak(side: Report | None) -> str:
    return "-" if side is None else number(side["peak_mib"], 0)


def _skipped(results: list[Report]) -> Iterator[str]:
    """One line for each side and reason, with the lengths."""
    found: dict[tuple[str, str], list[int]] = {}
    for result in results:
        for label, reason in result["skipped"].items():
            found.setdefault((label, reason), []).append(result["length"])
    for (label, reason), lengths in found.items():
        where = ", ".join(map(str, lengths))
        yield f"Not run: {LABELS[label]} at {where}: {reason.rstrip('.')}."
