"""What the benchmark on a GPU prints, and how two runs compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_sparse.recipes.benchmark.cost import ONLY_FASTER_FROM, SLOW_SECONDS
from lit_sparse.recipes.benchmark.peers import PEERS
from lit_sparse.recipes.benchmark.report import BadArgument, number, render_table, short, wrap

Report = dict[str, Any]

SPARSE_GROUPS = (
    ("law", ("length", "k(n)", "density")),
    ("sparse, ms", ("select", "fwd", "bwd", "total")),
    ("select", ("share",)),
    ("TFLOP/s", ("fwd", "bwd")),
    ("floor", ("ms", "times")),
    ("dense/sparse", ("time", "FLOPs")),
    ("sparse, MiB", ("peak", "per 1k")),
)

WHOLE = ("total", "kernels")
"""Parts of a peer that two runs are compared by."""

NOTE = (
    "Medians. k(n) at the last token; density: kept causal pairs / causal pairs. select, fwd, bwd: "
    "each apart; total: all three in one region, so it is not their sum. share: select / total. "
    "TFLOP/s: of the executed pairs (blocks whole, masked parts included), 4 D FLOPs a pair and "
    "query head forward, 10 D backward. times: total / floor. time: total of the faster dense peer "
    "/ total. peak: memory of a total beyond q, k, v and the gradient of the output; per 1k: for "
    "each 1024 tokens."
)

PEER_NOTE = (
    "ms: forward and backward. x: that / the same of the operator (above 1 the operator is "
    "faster): total with selection, kernels without. FlexAttention and NSA compute the selection's "
    "own blocks; the total of FlexAttention holds selection and mask building. A dense step of "
    f"more than {SLOW_SECONDS:g} s, or from {ONLY_FASTER_FROM} tokens on, ran once, unwarmed."
)


def lines(report: Report, title: str) -> list[str]:
    """All that the terminal shows of a finished run."""
    results = report["results"]
    measured = [result for result in results if "sparse" in result]
    printed = [*wrap(title), *wrap(_rates(report)), ""]
    printed += render_table(SPARSE_GROUPS, [sparse_cells(result) for result in measured])
    printed += ["", *wrap(NOTE), ""]
    columns = peer_columns(measured)
    if columns:
        groups: list[tuple[str, tuple[str, ...]]] = [("", ("length",))]
        groups += [
            (f"{PEERS[name].label}, {part}" if name in PEERS else f"{name}, {part}", ("ms", "x"))
            for name, part in columns
        ]
        printed += render_table(groups, [peer_cells(result, columns) for result in measured])
        printed += ["", *wrap(PEER_NOTE)]
    for line in [
        *_crossover(measured), *_remarks(results), *_dense_limit(report), *_skipped(results),
    ]:  # fmt: skip
        printed += wrap(line)
    return printed


def _crossover(results: list[Report]) -> Iterator[str]:
    """From which measured length on sparse attention is the faster one at all of them."""
    ratios = [(r["length"], r["ratio"]) for r in results if r.get("ratio") is not None]
    slower = [length for length, ratio in ratios if ratio <= 1]
    faster = [length for length, _ in ratios if length > max(slower, default=0)]
    if not ratios:
        return
    if not faster:
        yield "Crossover: dense attention is the faster one at every length measured."
        return
    line = f"Crossover: sparse attention is the faster one from {min(faster)} tokens on"
    if slower:
        line += (
            f", dense up to {max(slower)}: with Budget(dense_below={max(slower)}) shorter "
            "documents run the dense kernel"
        )
    yield f"{line}."


def sparse_cells(result: Report) -> list[str]:
    """The row of `SPARSE_GROUPS` of one length."""
    ms, length = result["sparse"]["ms"], result["length"]
    row = [str(length), str(result["keys"]), number(result["density"], 4)]
    row += [_time(ms[part]) for part in ("selection", "forward", "backward", "total")]
    row += [f"{result['selection_share']:.0%}"]
    row += [_time(result["tflops"][part]) for part in ("forward", "backward")]
    row += [_time(result["floor_ms"]), number(result["times_floor"], 2)]
    row += [number(result["ratio"], 2), number(result["flops_ratio"], 2)]
    peak = result["sparse"]["peak_mib"]
    row += [short(peak), short(None if peak is None else peak * 1024 / length)]
    return row


def peer_columns(results: list[Report]) -> list[tuple[str, str]]:
    """(peer, "total" or "kernels") that any length has, in the order of the peers."""
    found = {
        (name, part)
        for result in results
        for name, peer in result["peers"].items()
        for part in peer["ratio"]
    }
    order = list(PEERS)
    return sorted(found, key=lambda at: (order.index(at[0]) if at[0] in order else 99, *at))


def peer_cells(result: Report, columns: list[tuple[str, str]]) -> list[str]:
    row = [str(result["length"])]
    for name, part in columns:
        peer = result["peers"].get(name, {"ms": {}, "ratio": {}})
        row += [_time(peer["ms"].get(part)), number(peer["ratio"].get(part), 2)]
    return row


def compare(new: Report, old: Report) -> list[str]:
    """New time / old time at each length for everything that both measured."""
    before, after = _medians(old), _medians(new)
    columns = list(dict.fromkeys(column for _, column in after if column in {c for _, c in before}))
    lengths = list(dict.fromkeys(length for length, _ in after))
    rows = []
    for length in lengths:
        both = [(length, column) in before and (length, column) in after for column in columns]
        if any(both):
            rows.append([str(length)])
            rows[-1] += [
                number(after[length, column] / before[length, column] if known else None, 3)
                for column, known in zip(columns, both, strict=True)
            ]
    if not rows:
        return ["Nothing in common with the earlier run."]
    printed = ["New / old milliseconds (below 1 is faster now):", ""]
    groups: list[tuple[str, list[str]]] = [("", ["length"])]
    for column in columns:
        who, part = column.split(".")
        if groups[-1][0] != who:
            groups.append((who, []))
        groups[-1][1].append(_SHORT.get(part, part))
    printed += render_table(groups, rows)
    differing = [
        f"{what}: {old_value} then, {new_value} now"
        for what, new_value, old_value in _settings(new, old)
        if new_value != old_value
    ]
    if differing:
        printed += ["", *wrap("NOT ALIKE: " + "; ".join(differing))]
    return printed


def load(path: Path) -> Report:
    """The JSON of an earlier run.

    Raises:
        BadArgument: it is no report of the attention benchmark on a GPU.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadArgument(f"--compare {path}: {error}") from error
    if not isinstance(report, dict) or "matmul_tflops" not in report:
        raise BadArgument(f"--compare {path}: not a report of lit-sparse benchmark --device cuda")
    return report


_SHORT = {"selection": "select", "forward": "fwd", "backward": "bwd"}


def _medians(report: Report) -> dict[tuple[int, str], float]:
    return {
        (result["length"], f"{who}.{part}"): value
        for result in report["results"]
        for who, times in _timed(result)
        for part, value in times["ms"].items()
        if who == "sparse" or part in WHOLE
    }


def _timed(result: Report) -> Iterator[tuple[str, Report]]:
    if "sparse" in result:
        yield "sparse", result["sparse"]
    yield from result["peers"].items()


def _settings(new: Report, old: Report) -> Iterator[tuple[str, Any, Any]]:
    for where, keys in (
        ("problem", sorted(new["problem"].keys() | old["problem"].keys())),
        ("machine", ("gpu", "driver", "torch", "triton", "cudnn")),
    ):
        for key in keys:
            yield key, new.get(where, {}).get(key), old.get(where, {}).get(key)


def _rates(report: Report) -> str:
    floor, measured = report["floor_tflops"], report["matmul_tflops"]
    return (
        f"A big matrix product reaches {measured:.3g} TFLOP/s here; the floor is what the executed "
        f"pairs would take at {floor:.3g} TFLOP/s. Verified against float64 before timing."
    )


def _remarks(results: list[Report]) -> list[str]:
    remarks = {
        f"{_label(name)}: {peer['remark']}."
        for result in results
        for name, peer in result["peers"].items()
        if peer["remark"]
    }
    return sorted(remarks)


def _dense_limit(report: Report) -> Iterator[str]:
    for entry in report["dense_limit"]:
        head = f"Everything kept, {entry['length']} tokens: "
        if "skipped" in entry:
            yield f"{head}{entry['skipped']}."
            continue
        ours = entry["sparse"]["ms"]
        if "flash" not in entry:
            yield f"{head}{_time(ours['total'])} ms forward and backward."
            continue
        flash = entry["flash"]["ms"]
        speeds = {part: flash[part] / ours[part] for part in ("total", "forward", "backward")}
        yield (
            f"{head}{speeds['total']:.2f} times the speed of SDPA flash (forward "
            f"{speeds['forward']:.2f}, backward {speeds['backward']:.2f}; {_time(ours['total'])} "
            f"and {_time(flash['total'])} ms)."
        )


def _skipped(results: list[Report]) -> list[str]:
    """One line for each peer and reason, with the lengths."""
    found: dict[tuple[str, str], list[int]] = {}
    for result in results:
        for name, reason in result["skipped"].items():
            found.setdefault((name, reason), []).append(result["length"])
    return [
        f"Not run: {_label(name)} at {', '.join(map(str, lengths))}: {reason.rstrip('.')}."
        for (name, reason), lengths in found.items()
    ]


def _label(name: str) -> str:
    return PEERS[name].label if name in PEERS else name


def _time(milliseconds: float | None) -> str:
    """Three digits where there are that many; times range from 0.05 to 100000 ms."""
    if milliseconds is not None and milliseconds < 10:
        return number(milliseconds, 2)
    return short(milliseconds)
