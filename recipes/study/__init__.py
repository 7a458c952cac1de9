"""`lit-sparse study`: claims of the paper, and of this project, as experiments with verdicts."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    from lit_sparse.recipes.study import command

    return command.main(argv)
