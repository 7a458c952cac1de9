"""The options of `lit-sparse benchmark`: parsers of its jobs, defaults by device, checks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from lit_sparse.attention.select import check_power_of_two
from lit_sparse.budget import Budget
from lit_sparse.data.stores.workers import usable_cores
from lit_sparse.recipes.arguments import Parser
from lit_sparse.recipes.benchmark import cuda
from lit_sparse.recipes.benchmark.clock import MOST_RUNS
from lit_sparse.recipes.benchmark.report import BadArgument
from lit_sparse.recipes.benchmark.shapes import SHAPES
from lit_sparse.recipes.benchmark.steps import DTYPES
from lit_sparse.training.activations import Activations

PROGRAM = "lit-sparse benchmark"

DESCRIPTIONS = {
    "attention": "Time sparse attention, selection included, against dense attention.",
    "step": "Time a full training step of a model, with sparse and with dense attention.",
    "selection": "Measure how much attention mass each selection rule misses in a model.",
    "generation": "Measure what a trained model loses densely and in cached decoding.",
    "data": "Time tokenising, the row index and the loader, and measure their memory.",
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": [4096, 8192, 16384],
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
        "dtype": "float32",
        "repeats": 3,
    },
    "cuda": {
        "lengths": list(cuda.LENGTHS),
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "repeats": MOST_RUNS,
    },
}

STEP_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shape": "small",
        "lengths": [4096, 8192, 16384],
        "dtype": "float32",
        "repeats": 3,
        "activations": "keep",
    },
    "cuda": {
        "shape": "llama3.2-1b",
        "lengths": [8192, 32768, 131072],
        "dtype": "bfloat16",
        "repeats": 5,
        "activations": "recompute",
    },
}

DEFAULT_SECONDS = 330
"""What the benchmark on CUDA may take."""


def attention_parser() -> Parser:
    parser = _parser("attention", alpha=16.0, exponent=0.5, floor=0, block=64)
    add = parser.add_argument
    _add_device(parser)
    kinds: dict[str, tuple[Callable[[str], Any], str]] = {
        "lengths": (_integers, "context lengths, tokens, with commas"),
        "heads": (int, "query heads"),
        "kv-heads": (int, "key-value heads"),
        "head-dim": (int, "dimension of a head"),
        "repeats": (
            int,
            "timed runs, after one warm-up; on CUDA at most, fewer where they take long",
        ),
    }
    for name, (kind, text) in kinds.items():
        add(f"--{name}", type=kind, metavar="N", help=f"{text} ({_defaults(name)})")
    add("--plot", type=Path, metavar="PATH", help="draw time against length here (CUDA; .png)")
    add("--compare", type=Path, metavar="JSON", help="hold this run against an earlier one (CUDA)")
    add(
        "--seconds",
        type=int,
        metavar="N",
        help="drop peers, then lengths of dense attention, that would take the run past this "
        f"(CUDA; default: {DEFAULT_SECONDS})",
    )
    add(
        "--tune",
        action="store_true",
        help="instead: time alternatives to the kernels' launch table at the first length (CUDA)",
    )
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    return parser


def step_parser() -> Parser:
    parser = _parser("step", alpha=16.0, exponent=0.5, floor=0, block=64)
    add = parser.add_argument
    _add_device(parser)
    add("--shape", choices=SHAPES, help=f"the model ({_defaults('shape', STEP_DEFAULTS)})")
    wholes = ", ".join(f"{name} {shape.layers}" for name, shape in SHAPES.items())
    add("--layers", type=int, metavar="N", help=f"layers of it (default: {wholes})")
    add(
        "--lengths",
        type=_integers,
        metavar="N",
        help="tokens of a row, which is one document, with commas "
        f"({_defaults('lengths', STEP_DEFAULTS)})",
    )
    add(
        "--activations",
        choices=get_args(Activations),
        help="what layers keep for their backward, on both sides "
        f"({_defaults('activations', STEP_DEFAULTS)})",
    )
    add(
        "--liger",
        action=argparse.BooleanOptionalAction,
        help="Liger's loss and kernels instead of the chunked loss (default: on CUDA where it is "
        "installed)",
    )
    add("--compile", action="store_true", help="compile the layers (model.compile)")
    add(
        "--repeats",
        type=int,
        metavar="N",
        help=f"timed steps of each side, after a warm-up ({_defaults('repeats', STEP_DEFAULTS)})",
    )
    add(
        "--seconds",
        type=int,
        metavar="N",
        help="fewer repeats, then no dense attention, where they would take the run past this",
    )
    add("--no-memory", dest="memory", action="store_false", help="no peak memory on a CPU")
    return parser


def selection_parser() -> Parser:
    parser = _parser("selection", alpha=4.0, exponent=0.5, floor=128, block=16, sink=16)
    _add_text(parser)
    rows = "rows sampled in each (default: %(default)s)"
    parser.add_argument("--rows", type=int, default=64, help=rows)
    return parser


def generation_parser() -> Parser:
    parser = _bare_parser("generation")
    _add_text(parser)
    add = parser.add_argument
    add("--prompt", type=int, metavar="N", help="tokens of it read at once (default: half)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    return parser


def _add_text(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face directory; its tokenizer is used if it has one, else bytes",
    )
    add(
        "--data",
        default="stdlib",
        help="corpus: a folder, a file, or 'stdlib'; its validation documents are read "
        "(default: %(default)s)",
    )
    add("--length", type=int, default=4096, help="tokens of a document (default: %(default)s)")
    add("--documents", type=int, default=4, help="documents, at most (default: %(default)s)")


def data_parser() -> Parser:
    parser = _bare_parser("data")
    add = parser.add_argument
    add("--megabytes", type=int, default=48, help="text to tokenise (default: %(default)s)")
    add(
        "--documents",
        type=int,
        default=10_000_000,
        help="documents of the row index (default: %(default)s)",
    )
    add(
        "--processes",
        type=int,
        default=max(1, usable_cores() // 2),
        help="processes that tokenise (default: %(default)s)",
    )
    return parser


def _add_device(parser: Parser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run (default: %(default)s)",
    )


def _defaults(name: str, by_device: dict[str, dict[str, Any]] = DEFAULTS) -> str:
    on = {device: values[name.replace("-", "_")] for device, values in by_device.items()}
    texts = {
        device: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for device, value in on.items()
    }
    return f"default: {texts['cpu']}; on CUDA {texts['cuda']}"


def which(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Which job, and the arguments that are its own."""
    parser = Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--what", choices=DESCRIPTIONS, default="attention")
    options, rest = parser.parse_known_args(argv)
    return options.what, rest


def _parser(what: str, **law: Any) -> Parser:
    """What the jobs about attention take; `law` sets the defaults that they do not share."""
    parser = _bare_parser(what)
    default = {name: getattr(Budget(), name) for name in ("sink", "local", "late")} | law
    kinds: dict[str, tuple[Callable[[str], Any], str]] = {
        "alpha": (float, "factor of k(n) = alpha * n^exponent, keys"),
        "exponent": (float, "exponent of the law, 0 to 1"),
        "floor": (int, "fewest keys"),
        "sink": (int, "tokens at the start that are always kept"),
        "local": (float, "share of the budget spent on the nearest keys"),
        "late": (float, "share of the other blocks that a tile's own rows choose"),
        "block": (int, "keys of a block"),
    }
    for name, (kind, text) in kinds.items():
        parser.add_argument(
            f"--{name}", type=kind, default=default[name], help=f"{text} (default: %(default)s)"
        )
    add = parser.add_argument
    add("--tile", type=int, help="queries of a tile (default: by query heads a key-value head)")
    dtype = "default: float32" if what == "selection" else _defaults("dtype")
    add("--dtype", choices=DTYPES, help=f"({dtype})")
    return parser


def _bare_parser(what: str) -> Parser:
    """What every job takes."""
    others = " or ".join(f"--what {job} --help" for job in DESCRIPTIONS if job != what)
    parser = Parser(
        prog=f"{PROGRAM} --what {what}",
        description=DESCRIPTIONS[what],
        epilog=f"The other jobs: {PROGRAM} {others}.",
        allow_abbrev=False,
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    return parser


def check_common(options: argparse.Namespace) -> None:
    if options.threads is not None:
        at_least_one("threads", options.threads)
    try:
        for name in ("block", "tile"):
            if getattr(options, name, None) is not None:
                check_power_of_two(f"--{name}", getattr(options, name))
    except ValueError as error:
        raise BadArgument(str(error)) from error
    if options.json is not None and not options.json.parent.is_dir():
        raise BadArgument(f"--json {options.json}: there is no directory {options.json.parent}")


def budget(options: argparse.Namespace) -> Budget:
    try:
        return Budget(
            alpha=options.alpha,
            exponent=options.exponent,
            floor=options.floor,
            sink=options.sink,
            local=options.local,
            late=options.late,
        )
    except ValueError as error:
        raise BadArgument(str(error).replace("budget.", "--")) from error


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers with commas, got {text!r}") from None


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise BadArgument(f"--{name.replace('_', '-')} must be >= 1, got {value}")
