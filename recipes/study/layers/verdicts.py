"""What the numbers say of sparsity by depth: the rules, and the sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sparse.recipes.inspect.report import NOT_CENTRED
from lit_sparse.recipes.study.entries import Entries, normal_largest
from lit_sparse.recipes.study.findings import Outcome, Verdict
from lit_sparse.recipes.study.layers.depth import Depth, change_over_depth

# Difference of C between layers that is worth a law of their own.
_APART = 0.2

# Change of C from the first layer to the last that is none.
_STEADY = 0.05

# Difference of C that explains it.
_CLOSE = 0.1

# Difference of BIC that is strong evidence (Kass and Raftery 1995).
_STRONG = 6.0

# Largest entry over that of as many normal ones.
_HEAVY = 1.5

# Least share of the dimensions of independent entries, and largest mean cosine of two tokens.
_INDEPENDENT = (0.5, 0.1)


def verdicts(found: Sequence[Depth], seed: int) -> list[Verdict]:
    """Of all models together: a claim holds if it holds of each."""
    text = [d for d in found if d.measured.kind == "source"]
    trained = [d for d in text if d.measured.subject.trained]
    random = [d for d in text if not d.measured.subject.trained]
    return [
        _every_layer(trained),
        _gaussian(trained),
        _by_nature(random, trained),
        _one_exponent(trained, seed),
        _power_law(trained),
        _assumptions(trained),
    ]


def _every_layer(trained: Sequence[Depth]) -> Verdict:
    views = [("all", 0.05), ("all", 0.1), ("far", 0.05), ("far", 0.1)]
    heads = {view: [d.sublinear(*view) for d in trained] for view in views}
    everywhere = all(bool(x.all()) for each in heads.values() for x in each)
    mostly = all(bool((x.double().mean(1) >= 0.5).all()) for x in heads["all", 0.05])
    counts = "; ".join(
        f"{view} keys, eps {missed:g}: "
        f"{_counted(sum(int(x.sum()) for x in each), sum(x.numel() for x in each))}"
        for (view, missed), each in heads.items()
    )
    exponents = _by_model(trained, lambda d: f"C {_span(d.main.raw_exponent.mean(1))} by layer")
    return Verdict(
        "In trained models with residuals and normalisation a row needs n^C keys, C < 1, at every "
        "depth.",
        Outcome.of(everywhere, mostly),
        f"{exponents}. Heads whose 95 % interval of C is below 1: {counts}",
        "" if everywhere else "in the layers and heads that the count leaves out C = 1 is possible",
    )


def _gaussian(trained: Sequence[Depth]) -> Verdict:
    gaps = torch.cat([(d.main.raw_exponent - d.gaussian.raw_exponent).flatten() for d in trained])
    close = int((gaps.abs() < _CLOSE).sum())
    said = _by_model(
        trained,
        lambda d: (
            f"C {float(d.main.raw_exponent.mean()):.2f} against "
            f"{float(d.gaussian.raw_exponent.mean()):.2f}, keys at the longest texts "
            f"{float((d.share / d.gaussian_share).median()):.2g} times theirs (median head)"
        ),
    )
    return Verdict(
        "Independent Gaussian logits with the spread that each row has, a row of the theory, "
        "explain C.",
        Outcome.of(close >= 0.9 * len(gaps), close >= 0.5 * len(gaps)),
        f"{said}; C within {_CLOSE:g} of theirs in {_counted(close, len(gaps))}",
        "" if close >= 0.9 * len(gaps) else "the other heads' logits are of another shape",
    )


def _by_nature(random: Sequence[Depth], trained: Sequence[Depth]) -> Verdict:
    heads = [d.sublinear() for d in random]
    count, of = sum(int(x.sum()) for x in heads), sum(x.numel() for x in heads)
    shares = _by_model(
        random, lambda d: f"C {_span(d.main.raw_exponent.mean(1))}, k/n {_span(d.share.mean(1))}"
    )
    against = _by_model(
        trained, lambda d: f"C {_span(d.main.raw_exponent.mean(1))}, k/n {_span(d.share.mean(1))}"
    )
    return Verdict(
        "Attention is n^C-sparse by nature: the same architecture with random weights is, too.",
        Outcome.of(count == of, 2 * count >= of),
        f"random weights: {shares} by layer; C below 1 in {_counted(count, of)}. Trained: "
        f"{against}",
        "" if count == of else f"not in {of - count} heads, as the config draws the weights",
    )


def _one_exponent(trained: Sequence[Depth], seed: int) -> Verdict:
    deep = [d for d in trained if len(d.main.layers) > 1]
    changes = [change_over_depth(d.main.raw_exponent, seed) for d in deep]
    spreads = [float(x.max() - x.min()) for d in deep for x in [d.main.raw_exponent.mean(1)]]
    steady = bool(deep) and all(c.low < _STEADY and c.high > -_STEADY for c in changes)
    alike = max(spreads, default=math.inf) < _APART
    said = "; ".join(
        f"{d.measured.subject.name}: {c} from the first layer to the last, layers differ by up to "
        f"{spread:.2f}"
        for d, c, spread in zip(deep, changes, spreads, strict=True)
    )
    return Verdict(
        "One C serves every depth: it does not change from layer to layer.",
        Outcome.of(steady and alike, steady or alike),
        said or "one layer",
        ""
        if steady and alike
        else f"layers differ by {_APART:g} or more, without a trend: calibrate by layer"
        if steady
        else "C changes with depth: calibrate by layer",
    )


def _power_law(trained: Sequence[Depth]) -> Verdict:
    forms = [form for d in trained for layer in d.main.model for form in layer]
    misfits = [float(x) for d in trained for x in d.main.misfit.flatten()]
    fits = sum(x <= _STRONG for x in misfits) / len(misfits)
    best = forms.count("power") / len(forms)
    counted = ", ".join(f"{name} {forms.count(name)}" for name in dict.fromkeys(sorted(forms)))
    return Verdict(
        "A power of n is the form of the need, at every depth.",
        Outcome.of(best >= 0.5 and fits >= 0.9, fits >= 0.5),
        f"best by BIC: {counted} of {len(forms)} heads; no other form is better by more than "
        f"{_STRONG:g} in {_counted(round(fits * len(forms)), len(forms))}",
        "" if best >= 0.5 and fits >= 0.9 else "other forms fit as well or better in many heads",
    )


def _assumptions(trained: Sequence[Depth]) -> Verdict:
    layers = [entries for d in trained for entries in d.measured.inputs.values()]
    bounded = all(x.largest_over_rms < _HEAVY * normal_largest(x) for x in layers)
    least, most = _INDEPENDENT
    centred = all(x.mean_share < NOT_CENTRED for x in layers)
    independent = all(x.dimension_share > least and x.token_cosine < most for x in layers)
    held = {"bounded": bounded, "of mean 0": centred, "independent": independent}

    def span(of: Callable[[Entries], float]) -> str:
        values = [of(x) for x in layers]
        return f"{min(values):.2g} to {max(values):.2g}"

    return Verdict(
        "What enters attention after normalisation is what the theory assumes, at every depth: "
        "bounded, independent entries of mean 0.",
        Outcome.of(all(held.values()), bounded),
        f"by layer: largest over RMS {span(lambda x: x.largest_over_rms)} (normal entries: "
        f"{span(normal_largest)}), excess kurtosis {span(lambda x: x.excess_kurtosis)}; power that "
        f"all tokens share {span(lambda x: x.mean_share)}; cosine of two tokens "
        f"{span(lambda x: x.token_cosine)}; effective dimensions over those of independent entries "
        f"{span(lambda x: x.dimension_share)}",
        ""
        if all(held.values())
        else "they are not " + ", nor ".join(name for name, holds in held.items() if not holds),
    )


def _by_model(found: Sequence[Depth], say: Callable[[Depth], str]) -> str:
    return "; ".join(f"{d.measured.subject.name}: {say(d)}" for d in found)


def _counted(count: int, of: int, what: str = "heads") -> str:
    return f"{count} of {of} {what}"


def _span(values: Tensor) -> str:
    """Of layers."""
    return f"{float(values.min()):.2f} to {float(values.max()):.2f}"
