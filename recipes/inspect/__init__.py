"""`lit-sparse inspect`: how large a model's logits can be, are, and have to be."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    from lit_sparse.recipes.inspect import command

    return command.main(argv)
