"""lit-sparse inspect: how large the logits of models can be, are, and have to be for a budget.

From the weights: ||W_Q W_K^T||_F of every head, biases, QK-norm and RoPE included, and the largest
logit that they predict. From a dense run on a few texts: the largest logit and the range of logits.
Against them the range that the model's law k(n) requires at 8k to 1M tokens.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from lit_sparse.recipes.benchmark.report import BadArgument, environment, write_json
from lit_sparse.recipes.inspect import report
from lit_sparse.recipes.inspect.measure import Findings, Task, inspect_model

PROGRAM = "lit-sparse inspect"


def main(argv: list[str]) -> int:
    """Print the report on each model, one after the other and side by side. 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        task = _task(options)
        findings = [inspect_model(path, task, _progress) for path in options.model]
        _write(options, argv, findings, task)
    except BadArgument as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(report.lines(findings, task, options.heads)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="Hugging Face directories with safetensors, one or more to stand side by side",
    )
    add(
        "--data",
        metavar="STORE",
        help="text to measure on: a store, a folder, a file, or 'stdlib' (default: random tokens)",
    )
    add("--length", type=int, help="tokens of a text (default: 4096, or the model's positions)")
    add("--documents", type=int, default=2, help="texts, at most (default: %(default)s)")
    add("--rows", type=int, default=64, help="rows sampled in each (default: %(default)s)")
    add(
        "--missed",
        type=float,
        default=0.05,
        help="mass that a budget may miss, for the required range (default: %(default)s)",
    )
    add(
        "--delta",
        type=float,
        default=0.05,
        help="probability that the bound may fail (default: %(default)s)",
    )
    add("--heads", action="store_true", help="a line for every head")
    add("--json", type=Path, metavar="FILE", help="write all numbers here")
    add("--plot", type=Path, metavar="FILE", help="draw them here (PNG, PDF, SVG)")
    add("--dtype", default="float32", help="of the weights (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return parser


def _task(options: argparse.Namespace) -> Task:
    for name in ("length", "documents", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BadArgument(f"--{name} must be at least 1, got {value}")
    for name in ("missed", "delta"):
        if not 0 < getattr(options, name) < 1:
            raise BadArgument(f"--{name} must lie between 0 and 1, got {getattr(options, name):g}")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise BadArgument(f"--{name} {path}: there is no directory {path.parent}")
        if path is not None and path.is_dir():
            raise BadArgument(f"--{name} {path} is a directory; name a file")
    if options.plot is not None and options.plot.suffix not in (".png", ".pdf", ".svg"):
        raise BadArgument(f"--plot {options.plot} must end in .png, .pdf or .svg")
    for model in options.model:
        if not model.is_dir():
            raise BadArgument(f"--model: there is no directory {model}")
    if options.device not in ("cpu", "cuda"):
        raise BadArgument(f"--device must be cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("--device cuda: this machine has no CUDA device")
    names = ("data", "length", "documents", "rows", "missed", "delta", "dtype", "device")
    return Task(**{name: getattr(options, name) for name in names})


def _write(
    options: argparse.Namespace, argv: list[str], findings: list[Findings], task: Task
) -> None:
    try:
        if options.json is not None:
            machine = environment(shlex.join([*PROGRAM.split(), *argv]))
            settings = {"missed": task.missed, "delta": task.delta, "rows": task.rows}
            models = [found.to_dict() for found in findings]
            write_json(options.json, {"machine": machine, **settings, "models": models})
        if options.plot is not None:
            from lit_sparse.recipes.inspect.plot import plot

            plot(findings, options.plot)
    except OSError as error:
        raise BadArgument(str(error)) from error


def _progress(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
