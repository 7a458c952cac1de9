"""GPU backend: selection, forward and backward as Triton kernels.

`tables` is what kernels read of a plan; `scoring` and `choose` are the selection's kernels and
`select` their launches; `forward`, `dq` and `dkdv` are the attention's, launched by `backend`.
"""

from lit_sparse.attention.triton.backend import backward, check, forward

__all__ = ["backward", "check", "forward"]
