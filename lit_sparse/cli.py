"""lit-sparse: every recipe is a sub-command."""

from __future__ import annotations

import sys
from importlib import import_module

_RECIPES = {
    "fit": ("lit_sparse.recipes.fit", "train a model: lit-sparse fit --config NAME [--dry-run]"),
    "validate": ("lit_sparse.recipes.fit", "validate a checkpoint of a run"),
    "test": ("lit_sparse.recipes.fit", "the same, as Lightning's test stage"),
    "export": ("lit_sparse.recipes.export", "make a Hugging Face directory of a checkpoint"),
    "pack": ("lit_sparse.recipes.pack", "tokenise a corpus once, into a store to train from"),
    "configs": ("lit_sparse.recipes.shipped_configs", "list the shipped configs"),
    "kernels": ("lit_sparse.recipes.kernels", "compile the GPU kernels and report on them"),
    "calibrate": ("lit_sparse.recipes.calibrate", "measure the keys a model needs, write a budget"),
    "inspect": ("lit_sparse.recipes.inspect", "how large logits can be, are, and have to be"),
    "estimate": ("lit_sparse.recipes.estimate", "memory, FLOPs and days of a config"),
    "evaluate": ("lit_sparse.recipes.evaluate", "loss by position and long-range tasks of a model"),
    "study": ("lit_sparse.recipes.study", "experiments on the paper's claims, with verdicts"),
    "benchmark": ("lit_sparse.recipes.benchmark", "time sparse attention, measure the selection"),
}
_LIGHTNING = ("fit", "validate", "test")


def main(argv: list[str] | None = None) -> int:
    """The console script. Exit status 2 where the command line or the config is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    command = argv[0]
    if command not in _RECIPES:
        print(f"lit-sparse: error: no sub-command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    if command == "fit" and any(argument.split("=")[0] == "--dry-run" for argument in argv):
        return import_module("lit_sparse.recipes.dry_run").main(argv)
    try:
        recipe = import_module(_RECIPES[command][0])
        # Lightning parses its own sub-command names.
        return recipe.main(argv if command in _LIGHTNING else argv[1:])
    except KeyboardInterrupt:  # while there is nothing to save: fit and pack say more later
        print("lit-sparse: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, _RECIPES))
    lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in _RECIPES.items()]
    return "\n".join(
        ["usage: lit-sparse COMMAND ...", "", *lines, "", "lit-sparse COMMAND --help says more."]
    )
