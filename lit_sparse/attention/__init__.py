"""The operator: knows tensors, knows no model and no trainer."""

from lit_sparse.attention.op import sparse_attention
from lit_sparse.attention.select import select
from lit_sparse.attention.selection import Selection

__all__ = ["Selection", "select", "sparse_attention"]
