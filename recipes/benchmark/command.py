"""The command line of `lit-sparse benchmark`: arguments, the two jobs, what is printed."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from lit_sparse.attention.select import check_power_of_two
from lit_sparse.budget import Budget
from lit_sparse.recipes.benchmark import attention, selection
from lit_sparse.recipes.benchmark.report import (
    BadArgument,
    describe,
    environment,
    render_table,
    wrap,
    write_json,
)
from lit_sparse.recipes.benchmark.steps import DTYPES, Problem

PROGRAM = "lit-sparse benchmark"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArgument(message)


def main(argv: list[str]) -> int:
    """Run the command line. Returns the exit code: 0, or 2 where an argument is refused."""
    threads = torch.get_num_threads()
    try:
        what, rest = _what(argv)
        parse, measure = JOBS[what]
        options = parse().parse_args(rest)
        _check_common(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        machine = environment(shlex.join([*PROGRAM.split(), *argv]))
        report, lines = measure(options)
    except BadArgument as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print("\n".join([*lines, *wrap(describe(machine))]))
    if options.json is not None:
        write_json(options.json, {"what": what, "machine": machine, **report})
    return 0


# -- the two jobs --


def _run_attention(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if options.device == "cuda":
        raise BadArgument(
            "--device cuda: the CUDA benchmark comes with the Triton kernels, which this version "
            "does not have; pass --device cpu"
        )
    for name in ("heads", "kv_heads", "head_dim", "repeats"):
        _at_least_one(name, getattr(options, name))
    for length in options.lengths:
        _at_least_one("lengths", length)
    if options.heads % options.kv_heads:
        raise BadArgument(
            f"--kv-heads {options.kv_heads} must divide --heads {options.heads} (grouped-query "
            "attention)"
        )
    problems = [
        Problem(
            length=length,
            heads=options.heads,
            kv_heads=options.kv_heads,
            head_dim=options.head_dim,
            dtype=options.dtype,
            budget=_budget(options),
            block=options.block,
            tile=options.tile,
        )
        for length in options.lengths
    ]
    results = attention.run(
        problems, options.repeats, torch.get_num_threads(), options.memory, _progress
    )
    problem = {key: value for key, value in problems[0].to_dict().items() if key != "length"}
    title = (
        f"Attention forward and backward: {options.heads} query / {options.kv_heads} key-value "
        f"heads, head_dim {options.head_dim}, {options.dtype}, {problems[0].budget}, "
        f"block {options.block}, tile {results[0]['tile']}, {options.repeats} sparse runs each"
    )
    rows = [attention.cells(result) for result in results]
    table = render_table(attention.GROUPS, rows)
    lines = [*wrap(title), "", *table, "", *wrap(attention.NOTE)]
    disturbed = attention.warning(results, torch.get_num_threads())
    if disturbed is not None:
        lines += wrap(disturbed)
    return {"problem": problem, "repeats": options.repeats, "results": results}, lines


def _run_selection(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    for name in ("length", "documents", "rows"):
        _at_least_one(name, getattr(options, name))
    task = selection.Task(
        model=options.model,
        data=options.data,
        length=options.length,
        documents=options.documents,
        rows=options.rows,
        budget=_budget(options),
        block=options.block,
        tile=options.tile,
        dtype=options.dtype,
    )
    result = selection.run(task, _progress)
    title = (
        f"Selection quality: {task.model}, {result['layers']} layers of {result['heads']} query / "
        f"{result['kv_heads']} key-value heads, {len(result['documents'])} documents of "
        f"{task.length} tokens from {task.data}, {result['rows']} rows of the later half of each; "
        f"{task.budget}, sink {task.budget.sink}, local {task.budget.local:g}, block {task.block}"
    )
    rows = [selection.cells(entry) for entry in result["rules"]]
    table = render_table(selection.GROUPS, rows)
    lines = [*wrap(title), "", *table, "", *wrap(selection.NOTE)]
    law = {"budget": task.budget.to_dict(), "block": task.block, "tile": task.tile}
    return {**law, **result}, lines


# -- the command line --


def _attention_parser() -> _Parser:
    parser = _parser("attention", alpha=16.0, exponent=0.5, floor=0, block=64)
    add = parser.add_argument
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run (default: %(default)s)",
    )
    add(
        "--lengths",
        type=_integers,
        default=[4096, 8192, 16384],
        metavar="N,N",
        help="context lengths, tokens (default: 4096,8192,16384)",
    )
    add("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    add("--kv-heads", type=int, default=2, help="key-value heads (default: %(default)s)")
    add("--head-dim", type=int, default=64, help="dimension of a head (default: %(default)s)")
    add(
        "--repeats",
        type=int,
        default=3,
        help="timed runs, after one warm-up (default: %(default)s)",
    )
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    return parser


def _selection_parser() -> _Parser:
    parser = _parser("selection", alpha=4.0, exponent=0.5, floor=128, block=16, sink=16)
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
    add("--rows", type=int, default=64, help="rows sampled in each (default: %(default)s)")
    return parser


Run = Callable[[argparse.Namespace], tuple[dict[str, Any], list[str]]]
JOBS: dict[str, tuple[Callable[[], _Parser], Run]] = {
    "attention": (_attention_parser, _run_attention),
    "selection": (_selection_parser, _run_selection),
}


def _what(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Which job, and the arguments that are its own."""
    parser = _Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--what", choices=tuple(JOBS), default="attention")
    options, rest = parser.parse_known_args(argv)
    return options.what, rest


def _parser(what: str, **law: Any) -> _Parser:
    """What both jobs take; `law` sets the defaults that they do not share."""
    others = " or ".join(f"--what {job} --help" for job in JOBS if job != what)
    parser = _Parser(
        prog=f"{PROGRAM} --what {what}",
        description={
            "attention": "Time sparse attention, selection included, against dense attention.",
            "selection": "Measure how much attention mass each selection rule misses in a model.",
        }[what],
        epilog=f"The other job: {PROGRAM} {others}.",
        allow_abbrev=False,
    )
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
    add("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--json", type=Path, metavar="PATH", help="write all numbers here")
    return parser


def _check_common(options: argparse.Namespace) -> None:
    if options.threads is not None:
        _at_least_one("threads", options.threads)
    try:
        check_power_of_two("--block", options.block)
        if options.tile is not None:
            check_power_of_two("--tile", options.tile)
    except ValueError as error:
        raise BadArgument(str(error)) from error
    if options.json is not None and not options.json.parent.is_dir():
        raise BadArgument(f"--json {options.json}: there is no directory {options.json.parent}")


def _budget(options: argparse.Namespace) -> Budget:
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


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise BadArgument(f"--{name.replace('_', '-')} must be >= 1, got {value}")


def _progress(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
