"""lit-sparse benchmark: how fast sparse attention is, and how much of dense attention it keeps."""

from lit_sparse.recipes.benchmark.command import main

__all__ = ["main"]
