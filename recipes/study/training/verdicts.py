"""What the runs say: within 1 % of dense, ahead of a fixed window, ahead of a sliding one."""

from __future__ import annotations

import numpy as np

from lit_sparse.evaluation import Estimate, mean_of
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.training.measure import Result, by_arm, relative_losses

NEAR = 0.01
"""Share of dense attention's loss that sparse training may cost."""


def all_of(results: list[Result]) -> list[Verdict]:
    arms, longest = by_arm(results), results[0].longest
    law, dense, variance = arms["law"], arms["dense"], arms["law-variance"]
    windows = [arms[name] for name in ("fixed", "sliding")]
    return [
        _near_dense(law, dense, longest),
        *(_ahead(law, window, longest) for window in windows),
        _late(law, arms["law-no-late"], longest),
        # What the scorer of the blocks has to do with it.
        _near_dense(arms["law-exact"], dense, longest),
        _near_dense(variance, dense, longest),
        _ahead(variance, arms["sliding"], longest),
    ]


def _near_dense(law: list[Result], dense: list[Result], length: int) -> Verdict:
    cost = mean_of(relative_losses(law, dense, length))
    return Verdict(
        f"Training by {_said(law)} costs at most 1 % of dense training's validation loss at "
        f"{length} tokens",
        Outcome.of(cost.high <= NEAR, cost.mean <= NEAR),
        f"{_percent(cost)} with {law[0].arm.executed:.3f} of the pairs; seeds "
        f"{_seeds(law, dense, length)}; {_answered(law, dense, length)}",
        "" if cost.high <= NEAR else "the interval reaches past 1 %",
    )


def _ahead(law: list[Result], other: list[Result], length: int) -> Verdict:
    lead = mean_of(relative_losses(other, law, length))
    steady = all(_differences(other, law, length) > 0)
    return Verdict(
        f"At equal executed keys {_said(law)} is ahead of the {_said(other)} at {length} tokens",
        Outcome.of(lead.low > 0 and steady, lead.mean > 0),
        f"the other's validation loss is {_percent(lead)} above; seeds "
        f"{_seeds(other, law, length)}; {_answered(law, other, length)}",
        "" if lead.low > 0 and steady else "not in every seed, or the interval holds 0",
    )


def _late(law: list[Result], without: list[Result], length: int) -> Verdict:
    lead = mean_of(relative_losses(without, law, length))
    return Verdict(
        f"Late slots, which the queries of a tile choose themselves, help at {length} tokens",
        Outcome.of(lead.low > 0, lead.mean > 0),
        f"without them the validation loss is {_percent(lead)} above; seeds "
        f"{_seeds(without, law, length)}; {_answered(law, without, length)}",
        "" if lead.low > 0 else "the interval holds 0",
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


def _answered(own: list[Result], other: list[Result], length: int) -> str:
    """Share of the answer tokens of each task, of the two."""

    def share(results: list[Result], task: str) -> float:
        return float(np.mean([r.answers[task][length].token_accuracy for r in results]))

    tasks = [task for task, at in own[0].answers.items() if length in at]
    said = [f"{task} {share(own, task):.0%} and {share(other, task):.0%}" for task in tasks]
    return f"answer tokens right, of both: {', '.join(said)}"
