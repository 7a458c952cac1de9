"""What the runs say: within 1 % of dense, ahead of a fixed window, ahead of a sliding one."""

from __future__ import annotations

import numpy as np

from lit_sparse.evaluation import Estimate, mean_of
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.training.measure import Result, by_arm, relative_losses

NEAR = 0.01
"""Share of dense attention's loss that sparse training may cost."""


def all_of(results: list[Result]) -> list[Verdict]:
    """Supported is what holds by the interval over held-out files, and in every seed."""
    arms, longest = by_arm(results), results[0].longest
    law, dense, variance = arms["law"], arms["dense"], arms["law-variance"]
    windows = [arms[name] for name in ("fixed", "sliding")]
    late = f"Late slots, which the queries of a tile choose themselves, help at {longest} tokens"
    local = f"Half of the budget for the nearest keys is better than a quarter at {longest} tokens"
    return [
        _near_dense(law, dense, longest),
        *(_ahead(law, window, longest) for window in windows),
        _ahead(law, arms["law-no-late"], longest, late),
        _ahead(law, arms["law-local"], longest, local),
        # What the scorer of the blocks has to do with it.
        _near_dense(arms["law-exact"], dense, longest),
        _near_dense(variance, dense, longest),
        _ahead(variance, arms["sliding"], longest),
    ]


def _near_dense(law: list[Result], dense: list[Result], length: int) -> Verdict:
    cost = mean_of(relative_losses(law, dense, length))
    near = cost.high <= NEAR and bool((_differences(law, dense, length) <= NEAR).all())
    outcome = Outcome.of(near, cost.mean <= NEAR)
    limits = {
        Outcome.SUPPORTED: "",
        Outcome.LIMITED: "the interval, or a seed, reaches past 1 %",
        Outcome.NOT_HERE: "it costs more",
    }
    return Verdict(
        f"Training by {_said(law)} costs at most 1 % of dense training's validation loss at "
        f"{length} tokens",
        outcome,
        f"{_percent(cost)} with {law[0].arm.executed:.3f} of the pairs; seeds "
        f"{_seeds(law, dense, length)}; {_late(law, dense, length)}; "
        f"{_answered(law, dense, length)}",
        limits[outcome],
    )


def _ahead(law: list[Result], other: list[Result], length: int, claim: str = "") -> Verdict:
    lead = mean_of(relative_losses(other, law, length))
    ahead = lead.low > 0 and bool((_differences(other, law, length) > 0).all())
    outcome = Outcome.of(ahead, lead.mean > 0)
    limits = {
        Outcome.SUPPORTED: "",
        Outcome.LIMITED: "not in every seed, or the interval holds 0",
        Outcome.NOT_HERE: "the other's loss is not higher",
    }
    at_equal_keys = (
        f"At equal executed keys {_said(law)} is ahead of the {_said(other)} at {length} tokens"
    )
    return Verdict(
        claim or at_equal_keys,
        outcome,
        f"the validation loss of {_said(other)} is {_percent(lead)} above; seeds "
        f"{_seeds(other, law, length)}; {_late(other, law, length)}; "
        f"{_answered(law, other, length)}",
        limits[outcome],
    )


def _differences(own: list[Result], other: list[Result], length: int) -> np.ndarray:
    """Of each seed, the loss above the other's as a share of it."""
    pairs = zip(own, other, strict=True)
    return np.array([a.loss(length) / b.loss(length) - 1 for a, b in pairs])


def _said(runs: list[Result]) -> str:
    return runs[0].arm.title


def _percent(share: Estimate) -> str:
    return f"{100 * share.mean:+.2f} % ({100 * share.low:+.2f} to {100 * share.high:+.2f})"


def _seeds(own: list[Result], other: list[Result], length: int) -> str:
    return ", ".join(f"{100 * x:+.2f} %" for x in _differences(own, other, length))


def _late(own: list[Result], other: list[Result], length: int) -> str:
    late = mean_of(relative_losses(own, other, length, late=True))
    return f"in the last quarter of the texts {_percent(late)}"


def _answered(own: list[Result], other: list[Result], length: int) -> str:
    """Share of the answer tokens of each task, of the two."""

    def share(results: list[Result], task: str) -> float:
        return float(np.mean([r.answers[task][length].token_accuracy for r in results]))

    tasks = [task for task, at in own[0].answers.items() if length in at]
    said = [f"{task} {share(own, task):.0%} and {share(other, task):.0%}" for task in tasks]
    return f"answer tokens right, of both: {', '.join(said)}"
