"""`lit-sparse fit --dry-run`: a run is built without weights, checked and described, no more."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """See `command.main`."""
    from lit_sparse.recipes.dry_run import command

    return command.main(argv)
