"""lit-sparse kernels: what the compiler says of every Triton kernel, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lit_sparse.recipes.benchmark.report import render_table

if TYPE_CHECKING:
    from lit_sparse.attention.triton.ahead_of_time import Report

TARGETS = ("sm_80", "sm_86", "sm_90")
DIMS = (64, 96, 128, 256)

GROUPS = (
    ("launch", ("GPU", "head_dim", "kernel", "warps")),
    ("a thread", ("registers", "spilled bytes")),
    ("a program", ("shared KiB", "at a time", "products", "loads ahead")),
    ("ptxas", ("warnings",)),
)

NOTE = """at a time: programs that a multiprocessor holds. products: the tensor-core path.
loads ahead: steps between the start of a gathered load and its use, in the loop where they are
fewest."""


def main(argv: list[str]) -> int:
    """Compile for the GPUs and head dimensions asked for, print the table. 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="lit-sparse kernels", description=__doc__)
    parser.add_argument(
        "--targets", default="sm_80,sm_90", help=f"of {', '.join(TARGETS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--head-dims", default=",".join(map(str, DIMS)), help="(default: %(default)s)"
    )
    parser.add_argument("--groups", type=int, default=4, help="query heads per key-value head")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    options = parser.parse_args(argv)
    targets = options.targets.split(",")
    try:
        dims = [int(dim) for dim in options.head_dims.split(",")]
    except ValueError:
        parser.error(f"--head-dims must be whole numbers, got {options.head_dims}")
    for target in targets:
        if target not in TARGETS:
            parser.error(f"--targets must be of {', '.join(TARGETS)}, got {target}")
    if any(dim % 16 or not 16 <= dim <= 256 for dim in dims):
        parser.error(f"--head-dims must be multiples of 16 from 16 to 256, got {dims}")
    if not 1 <= options.groups <= 16:
        parser.error(f"--groups must be from 1 to 16, got {options.groups}")

    from lit_sparse.attention.triton.backend import interpreting

    if interpreting():
        print(
            "lit-sparse kernels: error: TRITON_INTERPRET is set: Triton would interpret the "
            "kernels and not compile them; unset it",
            file=sys.stderr,
        )
        return 2
    from lit_sparse.attention.triton.ahead_of_time import attention_calls, compile_call

    compiled = [
        compile_call(call, target)
        for target in targets
        for dim in dims
        for call in attention_calls(target, dim, options.groups)
    ]
    reports = list(dict.fromkeys(compiled))  # some launches do not depend on head_dim
    print("\n".join([*render_table(GROUPS, [cells(report) for report in reports]), "", NOTE]))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=2))
    return 0


def cells(report: Report) -> list[str]:
    """The row of `GROUPS`."""
    gathers = report.ahead or report.tensor_cores != "-"
    return [
        report.target,
        str(report.dim or "-"),
        report.kernel.removesuffix("_kernel"),
        str(report.warps),
        str(report.registers),
        str(report.spills),
        f"{report.shared / 1024:.0f}",
        str(report.programs),
        report.tensor_cores,
        str(report.ahead) if gathers else "-",
        "; ".join(report.warnings) or "-",
    ]
