"""The figures: what each rule costs against dense by position, and what it still finds."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_sparse.recipes.study.findings import Chart
from lit_sparse.recipes.study.report import COLOURS
from lit_sparse.recipes.study.training.measure import Result, by_arm

_COLOURS = (*COLOURS, "#999999")


def all_of(results: list[Result]) -> list[Chart]:
    longest = results[0].longest
    charts = [
        Chart(
            "loss",
            f"Validation loss of each rule above dense training's, at {longest} tokens by position "
            "and at every length over all positions. Line: mean over seeds; dots: seeds.",
            lambda figure: _losses(figure, results),
        )
    ]
    if results[0].answers:
        charts.append(
            Chart(
                "answers",
                "Share of the answers' tokens that are the model's first choice. Line: mean over "
                "seeds; dots: seeds.",
                lambda figure: _answers(figure, results),
            )
        )
    return charts


def _losses(figure: Any, results: list[Result]) -> None:
    arms, longest = by_arm(results), results[0].longest
    dense = arms["dense"]
    by_position, by_length = figure.subplots(1, 2, sharey=True)
    parts, lengths = dense[0].losses[longest].parts, sorted(dense[0].losses)
    for colour, (name, runs) in zip(_COLOURS, arms.items(), strict=True):
        if name == "dense":
            continue
        positions = [
            [
                100 * (a.losses[longest].of_texts(*part).mean() / _loss(b, longest, part) - 1)
                for part in parts
            ]
            for a, b in zip(runs, dense, strict=True)
        ]
        whole = [
            [100 * (a.loss(length) / b.loss(length) - 1) for length in lengths]
            for a, b in zip(runs, dense, strict=True)
        ]
        _lines(by_position, positions, colour, runs[0].arm.title)
        _lines(by_length, whole, colour, runs[0].arm.title)
    by_position.set_xticks(range(len(parts)), [f"{a}-{b - 1}" for a, b in parts])
    by_position.set(xlabel=f"position in texts of {longest} tokens", ylabel="loss above dense, %")
    by_length.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    by_length.set(xlabel="tokens of a text")
    for axes in (by_position, by_length):
        axes.axhline(0, color="0.3", lw=0.8)
        axes.axhline(1, color="0.3", lw=0.8, ls=":")
        axes.grid(alpha=0.25)
    figure.legend(*by_length.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _loss(run: Result, length: int, part: tuple[int, int]) -> float:
    return float(run.losses[length].of_texts(*part).mean())


def _answers(figure: Any, results: list[Result]) -> None:
    arms, tasks = by_arm(results), list(results[0].answers)
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for task, axis in zip(tasks, axes, strict=True):
        for colour, runs in zip(_COLOURS, arms.values(), strict=True):
            lengths = list(runs[0].answers[task])
            shares = [[r.answers[task][n].token_accuracy for n in lengths] for r in runs]
            _lines(axis, shares, colour, runs[0].arm.title)
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axis.set(title=task, xlabel="tokens", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("answer tokens right")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8)


def _lines(axis: Any, runs: list[list[float]], colour: str, label: str) -> None:
    """A line through the means, a dot for each run."""
    data = np.array(runs)
    axis.plot(range(data.shape[1]), data.mean(0), color=colour, marker="_", label=label)
    for one in data:
        axis.plot(range(data.shape[1]), one, ls="", marker=".", ms=4, color=colour, alpha=0.6)
