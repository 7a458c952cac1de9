"""`lit-sparse benchmark`: times sparse attention and data, measures what the selection misses."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    # Not above: a process that measures one thing starts faster without the rest.
    from lit_sparse.recipes.benchmark import command

    return command.main(argv)
