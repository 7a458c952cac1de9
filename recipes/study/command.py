"""lit-sparse study: run an experiment on a claim about sparse attention, and write its report.

A report is a directory with report.md, the tables as CSV, the figures as PNG and verdicts.json. The
reports of the full forms that come with lit-sparse are in recipes/study/reports.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from lit_sparse.recipes.arguments import Parser
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.evaluate.subject import huggingface_directory
from lit_sparse.recipes.study.findings import Findings, Settings

PROGRAM = "lit-sparse study"

STUDIES = {
    "sparsity": "how many keys a row needs, and which error falls with n",
    "windows": "constant, logarithmic, alpha n^C and proportional windows at equal cost",
    "norms": "length and weight norms: sparsity, and where attention collapses",
    "sensitivity": "the assumptions relaxed: correlated tokens, heavy tails, outlier features",
    "layers": "sparsity and C by depth in trained models",
    "radius": "R = B^2 ||W||_F across models and data, and what RoPE does to it",
    "collapse": "whether collapse shows in a task, and what mends it",
    "alpha": "calibrated alpha and C against a grid and the presets, on tasks",
    "training": "fine-tunes at equal executed keys: dense, alpha n^C, fixed, sliding window",
}
"""Name -> what it is about; each is the module of that name, whose `run` makes the findings."""

TAKES_MODELS = ("windows", "layers", "radius", "collapse", "alpha")

ON_MODELS = (*TAKES_MODELS, "training")
"""Those that train a small model first where they are given none."""


def main(argv: list[str]) -> int:
    """Run one study, write and print its report. 2 where something is refused."""
    try:
        # Intermixed: models may stand behind options.
        options = _parser().parse_intermixed_args(argv)
        settings = _settings(options)
        run: Callable[[Settings], Findings]
        run = import_module(f"lit_sparse.recipes.study.{options.study}").run
        begin = time.monotonic()
        findings = run(settings)
        from lit_sparse.recipes.study import base, report

        if options.study in ON_MODELS and not settings.models:
            findings = replace(findings, notes=[*findings.notes, base.NOTE])
        command = shlex.join([*PROGRAM.split(), *argv])
        title = f"Study `{options.study}`: {STUDIES[options.study]}"
        lines = report.write(title, findings, settings, command, time.monotonic() - begin)
    except (BadArgument, OSError) as error:
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(f"\nwritten to {settings.out}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name.ljust(12)} {about}" for name, about in STUDIES.items())
    parser = Parser(
        prog=PROGRAM,
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", choices=STUDIES, metavar="NAME", help="one of the above")
    add(
        "models",
        nargs="*",
        type=Path,
        metavar="MODEL",
        help=f"Hugging Face or run directories, for {', '.join(TAKES_MODELS)} (default: a small "
        "model that the study trains first)",
    )
    add("--quick", action="store_true", help="a smaller form, under 2 minutes on two cores")
    add("--large", action="store_true", help="training: 1k to 32k tokens on a GPU, for hours")
    add("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="of the report (default: NAME in that of --work)")
    add(
        "--work",
        type=Path,
        default=Path("runs/studies"),
        metavar="DIR",
        help="of models trained on the way, which the next study uses too (default: %(default)s)",
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    if options.models and options.study not in TAKES_MODELS:
        raise BadArgument(f"{options.study} takes no models, got {options.models[0]}")
    if options.seed < 0:
        raise BadArgument(f"--seed must be 0 or more, got {options.seed}")
    if options.large and (options.study != "training" or options.quick):
        raise BadArgument("--large is a form of training, and not together with --quick")
    if options.large and not torch.cuda.is_available():
        raise BadArgument("--large: this machine has no CUDA device")
    models = tuple(huggingface_directory(model) for model in options.models)
    out = options.out or options.work / options.study
    for name, directory in (("work", options.work), ("out", out)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(f"--{name} {directory}: {error.strerror}") from error
    return Settings(
        out=out,
        work=options.work,
        quick=options.quick,
        large=options.large,
        seed=options.seed,
        models=models,
        progress=_progress,
    )


def _progress(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)
