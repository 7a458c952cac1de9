"""`lit-sparse estimate`: memory, FLOPs and days of a run on GPUs that need not be there."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    from lit_sparse.recipes.estimate import command

    return command.main(argv)
