"""lit-sparse evaluate: long-context quality of models, sparse and dense side by side.

Loss by position on held-out documents, and tasks that only text far back answers: copy (random
characters once more), passkey (one key in a long text), multikey (one of several named keys),
multivalue (all values of one name), variables (a chain of assignments), aggregation (the most
common word). MODEL is a Hugging Face directory, or a run directory that holds one. Sparse is by
the law in the model's config, or that of --budget.

Documents are those that lit-sparse fit keeps for validation with the default data.seed and
data.validation_fraction: a model that was trained so on the same --data has not seen them. What
other models have seen nobody knows: choose the text accordingly.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from lit_sparse.attention.select import check_power_of_two
from lit_sparse.evaluation import NAMES, Questions, evaluate
from lit_sparse.recipes.arguments import Parser
from lit_sparse.recipes.benchmark.report import BadArgument, environment, write_json
from lit_sparse.recipes.benchmark.steps import DTYPES
from lit_sparse.recipes.evaluate.report import Result, lines
from lit_sparse.recipes.evaluate.subject import Loading, load

PROGRAM = "lit-sparse evaluate"

_SAY_SECONDS = 10


def main(argv: list[str]) -> int:
    """Evaluate, print, write. 2 where something is refused."""
    try:
        options = _parser().parse_args(argv)
        _check(options)
        results = [_evaluate(model, options) for model in options.models]
        print("\n".join(lines(results)))
        _write(options, shlex.join([*PROGRAM.split(), *argv]), results)
    except (BadArgument, OSError) as error:
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="directories, to stand side by side")
    add(
        "--lengths",
        type=_integers,
        metavar="N,N,..",
        help="tokens of a text or prompt (default: the model's context, and 1/2, 1/4, 1/8 of it)",
    )
    add(
        "--tasks",
        type=_names,
        default=list(NAMES),
        metavar="T,T,..",
        help=f"of {','.join(NAMES)}; ppl is the loss by position (default: all)",
    )
    add(
        "--data",
        default="stdlib",
        metavar="DATA",
        help="text: a store of lit-sparse pack, a folder, a file, or stdlib, Python's own source "
        "(default: %(default)s)",
    )
    add(
        "--all-documents",
        action="store_true",
        help="take all documents of --data: the model has seen none of them",
    )
    add("--documents", type=int, default=16, help="at each length (default: %(default)s)")
    add("--prompts", type=int, default=20, help="of each task and length (default: %(default)s)")
    add("--generate", action="store_true", help="let answers be generated as well")
    add(
        "--budget",
        metavar="LAW",
        help="instead of the model's law: budget.yaml of lit-sparse calibrate, a preset, dense, or "
        "keys as in alpha=16,exponent=.5,floor=0",
    )
    add("--block", type=int, help="keys of a block, with --budget (default: the model's, or 64)")
    add("--tile", type=int, help="queries of a tile, with --budget (default: the model's)")
    add(
        "--rope",
        metavar="RULE",
        help="extend positions to the longest length by a rule: yarn, abf, ntk, linear, llama3",
    )
    add("--json", type=Path, metavar="FILE", help="write all numbers here")
    add("--plot", type=Path, metavar="FILE", help="draw them here (PNG, PDF, SVG)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32; on CUDA bfloat16)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of texts and prompts (default: %(default)s)")
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers with commas, got {text!r}") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _check(options: argparse.Namespace) -> None:
    """What is wrong whatever the models and the text."""
    try:
        _questions(options, options.lengths or [2])
        for name in ("block", "tile"):
            if getattr(options, name) is not None:
                check_power_of_two(f"--{name}", getattr(options, name))
    except ValueError as error:
        named = str(error)
        raise BadArgument(named if named.startswith("--") else f"--{named}") from error
    if options.budget is None and (options.block or options.tile):
        raise BadArgument("--block and --tile need --budget: without it the model's own law holds")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise BadArgument(f"--{name} {path}: there is no directory {path.parent}")
        if path is not None and path.is_dir():
            raise BadArgument(f"--{name} {path} is a directory; name a file")
    if options.plot is not None and options.plot.suffix not in (".png", ".pdf", ".svg"):
        raise BadArgument(f"--plot {options.plot} must end in .png, .pdf or .svg")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("--device cuda: this machine has no CUDA device")


def _questions(options: argparse.Namespace, lengths: list[int]) -> Questions:
    return Questions(
        lengths,
        options.tasks,
        options.documents,
        options.prompts,
        generate=options.generate,
        seed=options.seed,
    )


def _evaluate(given: Path, options: argparse.Namespace) -> Result:
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    names = ("budget", "block", "tile", "lengths", "rope", "data", "all_documents", "device")
    subject = load(given, Loading(**{n: getattr(options, n) for n in names}, dtype=dtype))
    progress = _Progress(subject.name)
    try:
        found = evaluate(
            subject.model,
            subject.tokenizer,
            subject.documents,
            _questions(options, subject.lengths),
            progress,
        )
    except NotImplementedError as error:
        raise BadArgument(f"MODEL {subject.path}: {error}") from error
    if not found.finite:
        raise BadArgument(f"MODEL {subject.path} has losses that are not finite")
    return Result(subject, options.data, dtype, found)


def _write(options: argparse.Namespace, command: str, results: list[Result]) -> None:
    if options.json is not None:
        machine = environment(command) | {"device": options.device}
        if options.device == "cuda":
            machine["gpu"] = torch.cuda.get_device_name()
        settings = {"seed": options.seed, "prompts": options.prompts, "data": options.data}
        models = [result.to_dict() for result in results]
        write_json(options.json, {"machine": machine, **settings, "models": models})
    if options.plot is not None:
        # matplotlib takes long to import.
        from lit_sparse.recipes.evaluate.plot import plot

        plot(results, options.plot)
    for path in (options.json, options.plot):
        if path is not None:
            print(f"written: {path}", file=sys.stderr)


class _Progress:
    """Says on stderr what is being done, at most every few seconds."""

    def __init__(self, model: str) -> None:
        self._model, self._said = model, time.monotonic()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_SECONDS:
            self._said = now
            print(f"{PROGRAM}: {self._model}: {what}", file=sys.stderr, flush=True)
