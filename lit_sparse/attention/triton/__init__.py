"""GPU backend: selection, forward and backward as Triton kernels."""
