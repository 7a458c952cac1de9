"""`lit-sparse calibrate`: measures how many keys a model needs, and writes a budget for it."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    # Not above: what is wrong with the arguments is said before torch is loaded.
    from lit_sparse.recipes.calibrate import command

    return command.main(argv)
