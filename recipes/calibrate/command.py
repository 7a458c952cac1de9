"""lit-sparse calibrate: measure how many keys a model needs, and write a budget for it.

The model is run densely on long documents at several lengths; what sampled late rows need is fitted
by k(n) = alpha * n^C for every head; the law chosen from it is run on other documents at twice the
longest length, with the sparse operator, and its alpha raised until the target is met. DATA is a
store of lit-sparse pack, a text file, a folder, or 'stdlib' (Python's own source).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lit_sparse.attention.select import check_power_of_two
from lit_sparse.calibration import choose_law, feasibility, fit_heads, separate_lengths
from lit_sparse.recipes.arguments import Parser
from lit_sparse.recipes.benchmark.report import BadArgument, environment
from lit_sparse.recipes.benchmark.steps import DTYPES
from lit_sparse.recipes.calibrate.check import obey, raised, run_check
from lit_sparse.recipes.calibrate.measure import (
    Subject,
    default_lengths,
    late_start,
    load,
    local_window,
    longest_context,
    measure,
)
from lit_sparse.recipes.calibrate.report import (
    BUDGET,
    NUMBERS,
    Result,
    lines,
    write_budget,
    write_numbers,
)
from lit_sparse.recipes.calibrate.texts import choose_texts, open_documents

PROGRAM = "lit-sparse calibrate"

ENOUGH = 32
"""Documents at each length from which the intervals can be relied on."""

_SAY_SECONDS = 10


def main(argv: list[str]) -> int:
    """Calibrate. 2 where an argument is refused; 1 where the law misses its target at the end."""
    try:
        options = _parser().parse_args(argv)
        _check(options)
        return _calibrate(options, shlex.join([*PROGRAM.split(), *argv]))
    except (BadArgument, OSError) as error:
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; nothing was written.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    add("--data", required=True, metavar="DATA", help="where the documents come from")
    add("--out", type=Path, required=True, metavar="DIR", help="directory for what is written")
    add(
        "--target-mass",
        type=float,
        default=0.95,
        help="share of the attention mass that is kept in 95 %% of the rows (default: %(default)s)",
    )
    add(
        "--lengths",
        type=_integers,
        metavar="N,N,..",
        help="context lengths, tokens, rising, at least three over a factor 4 (default: 1/16, 1/8, "
        "1/4 and 1/2 of the model's context)",
    )
    add("--documents", type=int, default=32, help="at each length (default: %(default)s)")
    add("--check-documents", type=int, default=8, help="held out (default: %(default)s)")
    add("--rows", type=int, default=8, help="rows of a document (default: %(default)s)")
    add("--steps", type=int, default=6, help="values of alpha tried (default: %(default)s)")
    add("--prompts", type=int, default=8, help="of each task; 0: no tasks (default: %(default)s)")
    add("--floor", type=int, help="fewest keys (default: the need at the shortest length)")
    add("--block", type=int, help="keys of a block (default: the model's own law's, or 64)")
    add("--tile", type=int, help="queries of a tile (default: as for --block, or by heads)")
    add("--sink", type=int, help="tokens always kept at the start (default: as for --block, or 64)")
    add("--dtype", choices=DTYPES, help="of the weights (default: float32; on CUDA bfloat16)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of documents, rows, prompts (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a calibration that is there already")
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers with commas, got {text!r}") from None


def _check(options: argparse.Namespace) -> None:
    """What is wrong whatever the model and the data."""
    if not 0 < _missed(options.target_mass) < 1:
        raise BadArgument(f"--target-mass must lie between 0 and 1, got {options.target_mass:g}")
    least = {"documents": 3, "check_documents": 1, "rows": 1, "steps": 1, "prompts": 0, "seed": 0}
    for name, smallest in (least | {"floor": 0, "sink": 0}).items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise BadArgument(f"--{name.replace('_', '-')} must be >= {smallest}, got {value}")
    try:
        for name in ("block", "tile"):
            if getattr(options, name) is not None:
                check_power_of_two(f"--{name}", getattr(options, name))
    except ValueError as error:
        raise BadArgument(str(error)) from error
    if options.lengths is not None:
        _check_lengths(options.lengths)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("--device cuda: there is no GPU that PyTorch can use")
    there = [name for name in (BUDGET, NUMBERS) if (options.out / name).exists()]
    if there and not options.overwrite:
        raise BadArgument(
            f"--out {options.out} holds a calibration already ({', '.join(there)}): give another "
            "directory, or --overwrite"
        )


def _missed(target_mass: float) -> float:
    # .05, not .050000000000000044.
    return round(1 - target_mass, 9)


def _check_lengths(lengths: list[int]) -> None:
    given = ",".join(map(str, lengths))
    if sorted(set(lengths)) != lengths or lengths[0] < 1:
        raise BadArgument(f"--lengths must rise, each given once, got {given}")
    if len(separate_lengths(lengths)) < 3 or lengths[-1] < 4 * lengths[0]:
        raise BadArgument(
            f"--lengths {given} is too little to fit a law: give at least three lengths that "
            "differ by a quarter or more, the longest at least four times the shortest"
        )


def _calibrate(options: argparse.Namespace, command: str) -> int:
    say = _Progress()
    say(f"loading {options.model}", at_once=True)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    model, selecting = load(
        options.model, dtype, options.device, options.block, options.tile, options.sink
    )
    lengths = options.lengths or default_lengths(longest_context(model))
    _check_context(lengths, longest_context(model), given=options.lengths is not None)
    _check_shortest(lengths[0], selecting.budget.sink, local_window(model, selecting))
    vocabulary = model.get_input_embeddings().num_embeddings
    documents, tokenizer = open_documents(options.model, options.data, vocabulary)
    texts = choose_texts(
        documents, lengths, options.documents, options.check_documents, options.seed
    )
    # Before the long run, so that it is not lost to a directory that cannot be written.
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--out {options.out}: {error.strerror}") from error

    subject = Subject(options.model, model, selecting, texts, tokenizer)
    missed, seed, own = _missed(options.target_mass), options.seed, selecting.budget
    needs = measure(subject, missed, options.rows, seed, say)
    say(f"fitting {needs.keys[0].numel()} heads", at_once=True)
    fits = fit_heads(needs, seed=seed)
    fitted = choose_law(
        fits,
        floor=options.floor,
        sink=own.sink,
        local=own.local,
        late=own.late,
        block=selecting.block,
    )
    longest = 2 * lengths[-1]
    check = run_check(subject, fitted, longest, missed, options.steps, options.prompts, seed, say)
    chosen = raised(fitted, check.factor)
    result = Result(
        machine=_machine(options, command, dtype),
        settings=_settings(options) | {"lengths": lengths},
        texts=texts,
        needs=needs,
        fits=fits,
        fitted=fitted,
        chosen=chosen,
        law=obey(subject, chosen),
        feasible=feasibility(fits, chosen, [*lengths, longest]),
        check=check,
    )
    return _finish(options, result)


def _check_context(lengths: list[int], context: int, given: bool) -> None:
    if 2 * lengths[-1] > context:
        raise BadArgument(
            f"--lengths: the check at twice the longest, {2 * lengths[-1]} tokens, is past the "
            f"{context} tokens that the model's positions reach; the longest may be {context // 2}"
        )
    if not given:
        _check_lengths(lengths)


def _check_shortest(length: int, sink: int, local: int) -> None:
    least = late_start(length) + 1
    if least <= sink + local:
        raise BadArgument(
            f"--lengths: rows of a document of {length} tokens see {least} tokens and more, of "
            f"which {sink + local} are always kept ({sink} at the start, {local} next to the row): "
            "give longer --lengths, or smaller --sink, --block and --tile"
        )


def _machine(options: argparse.Namespace, command: str, dtype: str) -> dict[str, Any]:
    machine = environment(command) | {"device": options.device, "dtype": dtype}
    for name in ("lit-sparse", "transformers"):
        machine[name] = importlib.metadata.version(name)
    if options.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    values = vars(options)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _finish(options: argparse.Namespace, result: Result) -> int:
    """Write and print; the exit code."""
    # matplotlib takes long to import.
    from lit_sparse.recipes.calibrate.plot import EXPONENTS, LAW, plot_exponents, plot_law

    out = options.out
    for name, write in (
        (NUMBERS, write_numbers),
        (LAW, plot_law),
        (EXPONENTS, plot_exponents),
        (BUDGET, write_budget),
    ):
        write(out / name, result)
    print("\n".join(lines(result)))
    if options.documents < ENOUGH:
        print(
            f"! {options.documents} documents at each length are few: intervals can be relied on "
            f"from {ENOUGH} on."
        )
    print(f"\nWritten: {', '.join(str(out / n) for n in (BUDGET, NUMBERS, LAW, EXPONENTS))}")
    print(f"Train with it:  lit-sparse fit --config NAME --config {out / BUDGET}")
    return 0 if result.check.met else 1


class _Progress:
    """Says on stderr what is being done, at most every few seconds."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._said = self._begin

    def __call__(self, what: str, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._said >= _SAY_SECONDS:
            self._said = now
            print(f"{now - self._begin:6.0f} s  {what}", file=sys.stderr, flush=True)
