"""`lit-sparse evaluate`: loss by position and long-range tasks, sparse and dense side by side."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    from lit_sparse.recipes.evaluate import command

    return command.main(argv)
