"""What a kept set of keys loses: exact statements and bounds for a single row of attention.

A row has n keys with logits s and softmax p; S are the k keys that are kept. tau is the dense mass
of the dropped ones, the missed mass. Nothing here assumes how logits are distributed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse.theory.values import Value, at_least, between, real, share


def captured_mass(lse_kept: Value, lse: Value) -> Tensor:
    """1 - tau = exp(lse_S - lse), in (0, 1], from the log-sum-exps of kept and of all logits."""
    return _log_captured(lse_kept, lse).exp()


def missed_mass(lse_kept: Value, lse: Value) -> Tensor:
    """tau = 1 - exp(lse_S - lse), in [0, 1); exact, also where it is far below the rounding of 1.

    Norm: the dropped mass, which is also the total-variation distance (half the l1 norm) between p
    and its renormalised restriction to S.
    """
    return -torch.expm1(_log_captured(lse_kept, lse))


def kl_of_missed_mass(missed: Value) -> Tensor:
    """KL(p_S || p) = -ln(1 - tau) in nats, exact; infinite for a row that keeps nothing (tau 1)."""
    return -torch.log1p(-between("missed", missed, 0, 1))


def output_error_bound(missed: Value, value_norm: Value) -> Tensor:
    """||o - o_S|| <= 2 tau max ||v||: o and o_S are averages of values, under p and p_S.

    Norm: that of the output vector in which value_norm bounds every value. No assumptions; attained
    by kept values v and dropped values -v.
    """
    return 2 * between("missed", missed, 0, 1) * at_least("value_norm", value_norm, 0)


def output_error_bound_of_diameter(missed: Value, value_diameter: Value) -> Tensor:
    """||o - o_S|| <= tau max ||v_i - v_j||, since o - o_S = tau (mean of dropped - mean of kept).

    Never weaker than `output_error_bound`, since a diameter is at most 2 max ||v||; values that
    share a large common part make it much stronger.
    """
    return between("missed", missed, 0, 1) * at_least("value_diameter", value_diameter, 0)


def output_error_of_independent_values(
    missed: Value, collision_kept: Value, collision_dropped: Value
) -> Tensor:
    """Root mean square of ||o - o_S|| / ||v||: tau sqrt(c_S + c_rest), reconstructed.

    Norm: l2 of the output, renormalised over S, in units of the root mean square norm of a value.
    Assumes values of mean 0, independent of each other and of the scores; exact then.
    `collision` is the sum of squared weights of a set renormalised to 1, at least 1 / its size: so
    the error falls about as k^-1/2 even where tau itself grows. That is the sense in which k = n^C
    keys have decreasing loss and o(log n) have not (arXiv 2404.02690).
    """
    spread = between("collision_kept", collision_kept, 0, 1) + between(
        "collision_dropped", collision_dropped, 0, 1
    )
    return between("missed", missed, 0, 1) * spread.sqrt()


def entrywise_bound(k: Value) -> Tensor:
    """The (k+1)-th largest weight is at most 1 / (k + 1): k keys dropped no larger entry.

    Norm: entrywise (max) on weights that are *not* renormalised. Holds for any distribution, so
    k = n^C buys n^-C; it says nothing about the sum of what is dropped. Attained by k + 1 equal
    weights.
    """
    return 1 / (at_least("k", k, 0) + 1)


def gap_certificate(n: Value, k: Value, gap: Value) -> Tensor:
    """Most missed mass of the k largest of n keys, gap = s_(k) - s_(k+1) in nats.

    tau <= (n-k) e^-gap / (k + (n-k) e^-gap). No assumptions; attained by two-level rows. The kept
    set must be the k largest.
    """
    dropped, kept = _dropped(n, k), at_least("k", k, 1)
    light = dropped * torch.exp(-at_least("gap", gap, 0))
    return light / (kept + light)


def least_missed_mass(n: Value, k: Value, logit_range: Value) -> Tensor:
    """Least missed mass of any k of n keys whose logits span at most `logit_range` nats (2M).

    tau >= (n-k) / (n-k + k e^range). No other assumptions; attained by two-level rows. So where
    the range stays below ln(n^(1-C)), as it must for R = o(sqrt(ln n)), tau tends to 1 for every
    k = n^C with C < 1: "decreasing loss" (arXiv 2404.02690) is no statement about dropped mass.
    """
    dropped, kept = _dropped(n, k), at_least("k", k, 1)
    # e^-range, not e^range, which overflows.
    light = dropped * torch.exp(-at_least("logit_range", logit_range, 0))
    return light / (light + kept)


def required_logit_range(n: Value, k: Value, missed: Value) -> Tensor:
    """Least range of logits (largest - smallest, 2M, in nats) that lets k of n keys miss `missed`.

    2M >= ln((n-k)/k) + ln((1-missed)/missed), the inverse of `least_missed_mass`; necessary, not
    sufficient. 0 where the kept share of equal weights is enough, or k >= n. A QK-norm or a soft
    cap that allows less makes a budget infeasible.
    """
    dropped, kept = _dropped(n, k), at_least("k", k, 1)
    return ((dropped / kept).log() - torch.logit(share("missed", missed))).clamp(min=0)


def _dropped(n: Value, k: Value) -> Tensor:
    return (at_least("n", n, 1) - at_least("k", k, 1)).clamp(min=0)


def _log_captured(lse_kept: Value, lse: Value) -> Tensor:
    # Rounding may put the kept keys above all of them.
    return (real("lse_kept", lse_kept) - real("lse", lse)).clamp(max=0)
