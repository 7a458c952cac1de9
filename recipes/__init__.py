"""One runnable job a file; `lit_sparse.cli` gives each a sub-command."""
