"""Time against context length, log-log: the operator, its selection, its peers and the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_sparse.recipes.benchmark.peers import PEERS
from lit_sparse.recipes.benchmark.report import tokens

GUIDES = ((1.0, "n"), (1.5, "n$^{1.5}$"), (2.0, "n$^2$"))
"""Exponents of the guide lines."""

PEER_STYLE = {
    ("flash", "total"): ("tab:red", "s", "SDPA flash"),
    ("cudnn", "total"): ("tab:orange", "D", "SDPA cuDNN"),
    ("flex", "kernels"): ("tab:purple", "v", "FlexAttention, kernels"),
    ("flex", "total"): ("tab:pink", "^", "FlexAttention, selection and mask too"),
    ("nsa", "kernels"): ("tab:brown", "P", "fla NSA, kernels"),
}

Line = tuple[list[int], list[float]]


def curves(report: dict[str, Any]) -> dict[tuple[str, str], Line]:
    """(contestant, part) -> lengths in tokens and milliseconds, where measured."""
    found: dict[tuple[str, str], Line] = {}

    def add(who: str, part: str, length: int, value: float | None) -> None:
        if value is not None:
            lengths, values = found.setdefault((who, part), ([], []))
            lengths.append(length)
            values.append(value)

    for result in report["results"]:
        if "sparse" not in result:
            continue
        length, own = result["length"], result["sparse"]["ms"]
        add("sparse", "total", length, own["total"])
        add("sparse", "selection", length, own["selection"])
        add("sparse", "floor", length, result["floor_ms"])
        for name, part in PEER_STYLE:
            add(name, part, length, result["peers"].get(name, {"ms": {}})["ms"].get(part))
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    """Write the figure; the ending of the path decides the format (PNG, PDF, SVG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xscale("log", base=2)
    found = curves(report)
    for (who, part), (color, marker, label) in PEER_STYLE.items():
        if (who, part) in found:
            dashes = "-" if PEERS[who].kind == "dense" else "--"
            axes.plot(*found[who, part], dashes, color=color, marker=marker, ms=5, label=label)
    own = {
        "total": ("tab:blue", "o-", "sparse, with selection"),
        "selection": ("tab:cyan", "o--", "selection alone"),
        "floor": ("black", ":", "floor"),
    }
    for part, (color, style, label) in own.items():
        if ("sparse", part) in found:
            if part == "floor":
                label = f"floor: executed pairs at {report['floor_tflops']:.3g} TFLOP/s"
            width = 2.5 if part == "total" else 1.5
            axes.plot(*found["sparse", part], style, color=color, lw=width, ms=5, label=label)
    lengths = sorted({length for line in found.values() for length in line[0]})
    if lengths:
        axes.set_xticks(lengths, [tokens(length) for length in lengths], minor=False)
        axes.minorticks_off()
    if ("sparse", "total") in found:
        _guides(axes, *found["sparse", "total"])
    problem = report["problem"]
    gpu = report.get("machine", {}).get("gpu", "")
    axes.set_title(
        f"Attention, forward and backward: {problem['heads']} query / {problem['kv_heads']} "
        f"key-value heads of {problem['head_dim']}, {problem['dtype']}"
        + (f"\n{gpu}" if gpu else ""),
        fontsize=11,
    )
    axes.set_xlabel("context length n (tokens)")
    axes.set_ylabel("time (milliseconds)")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=9, loc="upper left")
    figure.savefig(path)


def _guides(axes: Any, lengths: list[int], values: list[float]) -> None:
    """Powers of n through the operator's first point, faint, within the figure's own limits."""
    if len(lengths) < 2:
        return
    limits = axes.get_ylim()
    first, last = lengths[0], lengths[-1]
    for exponent, name in GUIDES:
        end = values[0] * (last / first) ** exponent
        axes.plot([first, last], [values[0], end], color="gray", lw=0.8, alpha=0.7, zorder=0)
        axes.annotate(
            name,
            (last, end),
            xytext=(4, 0),
            textcoords="offset points",
            color="gray",
            fontsize=9,
            va="center",
            annotation_clip=True,
        )
    axes.set_ylim(limits)
