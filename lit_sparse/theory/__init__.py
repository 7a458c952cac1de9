"""Bounds and predictions for attention over k of n keys: pure functions, beside the measurements.

Every function takes numbers or tensors that broadcast, computes in float64, returns a float64
tensor (of no dimension for numbers: `float(...)` where a number is needed), and raises a ValueError
that names the argument out of its range. Each says its norm and its assumptions: "decreasing loss"
with k = n^C keys is true of one norm and false of another. Formulas are reconstructed; the claims
that they belong to are of "How Sparse Attention Approximates Exact Attention? Your Attention is
Naturally n^C-Sparse" (arXiv 2404.02690).
"""

from lit_sparse.theory.concentration import (
    keys_floor,
    largest_logit_bound,
    logit_scale,
    logit_tail,
    product_norm,
    worst_row_logit_scale,
)
from lit_sparse.theory.cost import alpha_for_share, cost_ratio, sparse_cost
from lit_sparse.theory.kept import (
    captured_mass,
    entrywise_bound,
    gap_certificate,
    kl_of_missed_mass,
    least_missed_mass,
    missed_mass,
    output_error_bound,
    output_error_bound_of_diameter,
    output_error_of_independent_values,
    required_logit_range,
)
from lit_sparse.theory.shapes import (
    collapse_length,
    collapse_sigma,
    gamma,
    gamma_of_entropy,
    gaussian_keys_fraction,
    rank_power_keys,
    rem_entropy,
    rem_exponent,
    rem_max_weight,
)

__all__ = [
    "alpha_for_share",
    "captured_mass",
    "collapse_length",
    "collapse_sigma",
    "cost_ratio",
    "entrywise_bound",
    "gamma",
    "gamma_of_entropy",
    "gap_certificate",
    "gaussian_keys_fraction",
    "keys_floor",
    "kl_of_missed_mass",
    "largest_logit_bound",
    "least_missed_mass",
    "logit_scale",
    "logit_tail",
    "missed_mass",
    "output_error_bound",
    "output_error_bound_of_diameter",
    "output_error_of_independent_values",
    "product_norm",
    "rank_power_keys",
    "rem_entropy",
    "rem_exponent",
    "rem_max_weight",
    "required_logit_range",
    "sparse_cost",
    "worst_row_logit_scale",
]
