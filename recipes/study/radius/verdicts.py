"""What the numbers say of R: the rules, and the sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sparse import theory
from lit_sparse.recipes.inspect.report import SAYS_NOTHING
from lit_sparse.recipes.study.entries import normal_largest
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.radius.measure import Radii
from lit_sparse.recipes.study.radius.rope import NONE, OWN, Rotated
from lit_sparse.recipes.study.stats import Estimate, mean_of, rank_correlation

# Rank correlation from which one quantity may stand for another.
_USABLE = 0.5

# B in units of that of as many normal entries.
_HEAVY = 1.5

# Factor between texts up to which R is a property of the model.
_ALIKE = 1.5


def verdicts(found: Sequence[Radii], rotated: Sequence[Rotated], seed: int) -> list[Verdict]:
    """A claim holds if it holds of each trained model, on Python source where nothing else is
    said."""
    trained = [r for r in found if r.subject.trained]
    text = [r for r in trained if r.kind == "source"]
    return [
        _bound(text),
        _predicts(
            "sigma, the spread of a head's logits",
            {r.label: correlation_with_spread(r, seed) for r in text},
            _ratios(text),
        ),
        _predicts(
            "the keys that a head needs: larger R, fewer keys",
            {r.label: _negated(correlation_with_share(r, seed)) for r in text},
            "",
        ),
        _bounded(trained),
        _of_the_model(trained),
        _below_collapse(text, [r for r in found if not r.subject.trained and r.kind == "source"]),
        _lowered(rotated, seed),
        _rules(rotated, seed),
    ]


def correlation_with_spread(radii: Radii, seed: int) -> Estimate:
    """Of R, with the root mean square for B, and sigma; over heads."""
    return rank_correlation(radii.by_rms.flatten(), radii.spread.flatten(), seed)


def correlation_with_share(radii: Radii, seed: int) -> Estimate:
    """Of the same R and k / n."""
    return rank_correlation(radii.by_rms.flatten(), radii.share.flatten(), seed)


def correlation_with_largest(radii: Radii, seed: int) -> Estimate:
    """Of R with the largest entry, and the largest logit."""
    return rank_correlation(radii.by_largest.flatten(), radii.largest.flatten(), seed)


def _bound(text: Sequence[Radii]) -> Verdict:
    ratios = [(r.bound / r.largest).flatten() for r in text]
    broken, heads = sum(int((x < 1).sum()) for x in ratios), sum(map(len, ratios))
    median = [float(x.median()) for x in ratios]
    said = _by_model(
        text, lambda r: f"bound {_middle(r.bound / r.largest)} times the largest logit"
    )
    estimates = _by_model(text, lambda r: f"{_middle(r.estimate / r.largest)}")
    holds = broken == 0
    return Verdict(
        "R = B^2 ||W||_F bounds the largest logit, and closely enough to say something "
        f"(within {SAYS_NOTHING:g} times).",
        Outcome.of(holds and max(median) <= SAYS_NOTHING, holds),
        f"{said} (median head, least to most); passed in {broken} of {heads} heads. With the root "
        f"mean square for B: {estimates}",
        "it holds, and says nothing" if holds and max(median) > SAYS_NOTHING
        else "" if holds else "inputs and rows are not what it assumes",
    )  # fmt: skip


def _predicts(what: str, by_model: dict[str, Estimate], more: str) -> Verdict:
    usable = all(x.low > _USABLE for x in by_model.values())
    some = all(x.low > 0 for x in by_model.values())
    said = "; ".join(f"{name}: {estimate}" for name, estimate in by_model.items())
    return Verdict(
        f"R predicts, across the heads of a model, {what}.",
        Outcome.of(usable, some),
        f"rank correlation {said}{more}",
        "" if usable else f"no correlation that is above {_USABLE:g} for certain in each model",
    )


def _ratios(text: Sequence[Radii]) -> str:
    said = _by_model(text, lambda r: _middle(r.spread / r.by_rms))
    return f". sigma / R with the root mean square for B: {said} (median head, least to most)"


def _bounded(trained: Sequence[Radii]) -> Verdict:
    excess = [x.largest_over_rms / normal_largest(x) for r in trained for x in r.inputs]
    hard = [x.largest_over_rms / math.sqrt(x.total.numel()) for r in trained for x in r.inputs]
    said = "; ".join(
        f"{name}: {min(values):.1f} to {max(values):.1f}"
        for name, values in _by_kind(trained, lambda r: [x.largest_over_rms for x in r.inputs])
    )
    return Verdict(
        "B is bounded under RMSNorm, in every layer and on every text: the largest entry is as "
        "that of normal ones.",
        Outcome.of(max(excess) < _HEAVY, max(hard) < 0.5),
        f"B over the root mean square by layer, {said}; at most {max(excess):.2f} times that of "
        f"as many normal entries, and {max(hard):.2f} of sqrt(d_model)",
        "" if max(excess) < _HEAVY else "some features are far larger than the others",
    )


def _of_the_model(trained: Sequence[Radii]) -> Verdict:
    factors = {}
    for name in dict.fromkeys(r.subject.name for r in trained):
        own = [r for r in trained if r.subject.name == name]
        factors[name] = _factor([r.by_rms for r in own]), _factor([r.by_largest for r in own])
    of_rms, of_largest = (max(each) for each in zip(*factors.values(), strict=True))
    said = "; ".join(f"{name}: {rms:.2f}, {most:.2f}" for name, (rms, most) in factors.items())
    return Verdict(
        "R belongs to the model: what it reads hardly changes it.",
        Outcome.of(of_largest < _ALIKE, of_rms < _ALIKE),
        "largest over least of R between kinds of text, in the layer where they differ most, with "
        f"the root mean square and with the largest entry for B: {said}",
        "" if of_largest < _ALIKE else "the largest entry depends on the text",
    )


def _below_collapse(text: Sequence[Radii], random: Sequence[Radii]) -> Verdict:
    def over(radii: Radii, values: Tensor) -> Tensor:
        return values / theory.collapse_sigma(radii.length)

    said = _by_model(
        [*text, *random],
        lambda r: (
            f"R {_middle(over(r, r.by_rms))}, sigma {_middle(over(r, r.spread))} at "
            f"{r.length} tokens"
        ),
    )
    of_r, of_sigma = (
        torch.cat([over(r, getattr(r, name)).flatten() for r in text]) >= 1
        for name in ("by_rms", "spread")
    )
    both = int(of_r.sum()), int(of_sigma.sum())
    return Verdict(
        "R, and with it sigma, stays below sqrt(2 ln n), where Gaussian logits collapse, at the "
        "context that a model was trained for.",
        Outcome.of(both == (0, 0), both[0] == 0),
        f"over sqrt(2 ln n), with the root mean square for B: {said} (median head, least to most); "
        f"of {len(of_r)} heads of trained models R is above in {both[0]}, sigma in {both[1]}",
        "" if both == (0, 0)
        else "R is, sigma is not: R is no sign of collapse" if both[0] == 0
        else "whether R grows with n was not measured",
    )  # fmt: skip


def _lowered(rotated: Sequence[Rotated], seed: int) -> Verdict:
    ratios = {}
    for own, none in _pairs(rotated, NONE):
        ratio = own.context.weight / none.context.weight
        ratios[own.subject.name] = (mean_of(ratio.flatten(), seed), ratio)
    lower = all(mean.high < 1 for mean, _ in ratios.values())
    mostly = all(mean.mean < 1 for mean, _ in ratios.values())
    said = "; ".join(
        f"{name}: {mean}, heads {float(ratio.min()):.2f} to {float(ratio.max()):.2f}"
        for name, (mean, ratio) in ratios.items()
    )
    return Verdict(
        "RoPE lowers R: over the distances of its context ||W_Q Rot W_K^T||_F is less than "
        "without a rotation.",
        Outcome.of(lower, mostly),
        f"R with the model's own rotation over R with none, mean over heads: {said}",
        "" if lower else "not certain in each model" if mostly else "the mean head's is not lower",
    )


def _rules(rotated: Sequence[Rotated], seed: int) -> Verdict:
    found = {}
    for name in dict.fromkeys(r.subject.name for r in rotated):
        pairs = [
            (other.context, own.context)
            for own, other in _pairs([r for r in rotated if r.subject.name == name], None)
        ]
        # [heads, rules]: a head's rules are not independent of each other.
        change = torch.stack([(a.by_rms / b.by_rms).flatten() for a, b in pairs], 1)
        seen = torch.stack([(a.spread / b.spread).flatten() for a, b in pairs], 1)
        found[name] = rank_correlation(change, seen, seed)
    usable = all(x.low > _USABLE for x in found.values())
    some = all(x.low > 0 for x in found.values())
    said = "; ".join(f"{name}: {estimate}" for name, estimate in found.items())
    return Verdict(
        "What another RoPE rule (none, another theta, YaRN) does to R tells what it does to the "
        "logits' spread.",
        Outcome.of(usable, some),
        f"rank correlation of both changes, over heads and rules at the model's context (intervals "
        f"over heads): {said}",
        "" if usable else f"no correlation that is above {_USABLE:g} for certain in each model",
    )


def _pairs(rotated: Sequence[Rotated], rule: str | None) -> list[tuple[Rotated, Rotated]]:
    """The model's own rotation, beside that of a rule (None: each other one)."""
    own = {id(r.subject): r for r in rotated if r.rule == OWN}
    return [(own[id(r.subject)], r) for r in rotated if r.rule != OWN and rule in (None, r.rule)]


def _by_kind(
    found: Sequence[Radii], of: Callable[[Radii], list[float]]
) -> list[tuple[str, list[float]]]:
    kinds = dict.fromkeys(r.kind for r in found)
    return [(kind, [x for r in found if r.kind == kind for x in of(r)]) for kind in kinds]


def _by_model(found: Sequence[Radii], say: Callable[[Radii], str]) -> str:
    return "; ".join(f"{r.label}: {say(r)}" for r in found)


def _middle(values: Tensor) -> str:
    return f"{float(values.median()):.2f} ({float(values.min()):.2f} to {float(values.max()):.2f})"


def _negated(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.mean, -estimate.high, -estimate.low)


def _factor(by_kind: Sequence[Tensor]) -> float:
    """Between kinds of text, of mean heads; [L, H] each."""
    means = torch.stack([values.mean(1) for values in by_kind])
    return float((means.amax(0) / means.amin(0)).max())
