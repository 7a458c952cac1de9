"""lit-sparse estimate: memory, FLOPs and days of a config on named GPUs, without a GPU.

Takes the configs of lit-sparse fit with the same changes (--model.activations recompute,
--sparse_attention.budget.alpha 8, ...). Builds no weights and reads no data. Prints the work of
each curriculum stage, the memory of one GPU under each sharding, and the smallest sharding that
fits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_sparse.recipes.benchmark.report import write_json
from lit_sparse.recipes.estimate.gpus import GPUS, Gpu
from lit_sparse.recipes.messages import own_words

PROGRAM = "lit-sparse estimate"


def main(argv: list[str]) -> int:
    """Print the estimate. 2 where an option, a key or the config is wrong."""
    options, config = _parser().parse_known_args(argv)
    try:
        gpus = _check(options, config)
        # transformers and Lightning take seconds to import.
        from lit_sparse.recipes.estimate import report
        from lit_sparse.recipes.estimate.result import Estimate
        from lit_sparse.recipes.estimate.settings import read_settings
        from lit_sparse.recipes.fit import resolve_configs

        settings = read_settings(resolve_configs(config), options.devices)
        found = Estimate.of(settings, gpus, options.utilisation)
        if options.json is not None:
            write_json(options.json, found.to_dict())
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"{PROGRAM}: error: {' '.join(own_words(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(report.lines(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        usage="%(prog)s --config NAME_OR_PATH [options] [--key.of.the.config VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--gpus",
        default="h100,a100-40,l40s",
        metavar="NAMES",
        help=f"of {', '.join(GPUS)} (default: %(default)s)",
    )
    add(
        "--devices",
        type=int,
        metavar="N",
        help="GPUs at hand (default: trainer.devices x trainer.num_nodes, or 8)",
    )
    add(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of a GPU's peak that training is assumed to reach (default: %(default)s)",
    )
    add("--json", type=Path, metavar="PATH", help="write all numbers here")
    return parser


def _check(options: argparse.Namespace, config: list[str]) -> list[Gpu]:
    if not any(argument.split("=")[0] in ("--config", "-c") for argument in config):
        raise ValueError("give --config NAME_OR_PATH; lit-sparse configs lists the names")
    names = options.gpus.split(",")
    unknown = [name for name in names if name not in GPUS]
    if unknown:
        raise ValueError(f"--gpus: {', '.join(unknown)} is not one of {', '.join(GPUS)}")
    if options.devices is not None and options.devices < 1:
        raise ValueError(f"--devices must be at least 1, got {options.devices}")
    if not 0 < options.utilisation <= 1:
        raise ValueError(f"--utilisation must be in (0, 1], got {options.utilisation:g}")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ValueError(f"--json {options.json}: name a file in a directory that exists")
    return [GPUS[name] for name in names]
